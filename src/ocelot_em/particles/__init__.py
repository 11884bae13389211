"""From a merged result to particles: significance, peaks, duplicates, the table."""
