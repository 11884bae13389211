"""Data model: maps, regions and tiles, search spaces, histograms. Pure."""
