"""Readers: one module per kind of file, and `open` for whatever a source names."""
