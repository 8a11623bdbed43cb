"""Where tensors go: each sink lays out its files from headers and encodes blocks into them."""
