"""Vocabulary and geometry: maps, regions and tiles, search spaces, histograms. Pure."""
