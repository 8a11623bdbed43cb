"""Encoders of the output formats: safetensors, FP8, GGUF and PEFT adapters."""
