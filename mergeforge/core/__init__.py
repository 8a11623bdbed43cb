"""Basic types: tensor shapes and tiles, dtypes, checksums, sizes, registries."""
