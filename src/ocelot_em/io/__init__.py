"""Import and export of other formats, one module each."""
