"""Statistics collected while a tile is merged, and their stored records."""
