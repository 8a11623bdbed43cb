"""Quantized checkpoints: groups of stored tensors that are read as one 16-bit tensor each.

A quantized weight is stored as several tensors (packed codes, scales, zero points, a description).
`detect_quantization` finds which of them belong together, by their names and shapes more than by what the config says,
and replaces them by a tensor that reads and dequantizes the rows that a tile needs. The quantization_config is removed
from the config. Unquantized tensors stay as they are; unknown formats are refused.
"""

from mergeforge.checkpoints.quantized.detect import detect_quantization

__all__ = ["detect_quantization"]
