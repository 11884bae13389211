"""What is collected of a tile while it is merged, and its stored record."""
