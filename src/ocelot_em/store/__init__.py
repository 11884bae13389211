"""Searches and results on disk or in a bucket."""
