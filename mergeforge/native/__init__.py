"""The C library and its bindings."""
