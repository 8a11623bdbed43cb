"""GGUF: reading, metadata, tensor types, architectures and vocabularies."""
