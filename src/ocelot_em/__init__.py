"""Merge the partial results of 2D template matching out of core, tile by tile."""

__version__ = "0.1.0"
