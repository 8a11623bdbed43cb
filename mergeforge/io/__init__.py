"""Disk access, file layouts, safetensors headers, and remote inputs."""
