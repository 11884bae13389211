"""Plots, reports, store inspection and viewers."""
