"""Particle picking from a merged result: significance, peaks, duplicates, tables."""
