"""Quantised checkpoints as sources: stored groups of tensors become one 16-bit tensor each.

A quantised weight lies in several tensors (packed codes, scales, zero points, a description).
`recognise` finds which belong together, by their names and shapes more than by what the config
claims, and puts in their place a way that reads and dequantises the rows that a tile needs. The config
loses its quantization_config. What is not quantised stays as it is; what is not understood is refused.
"""

from mergeforge.checkpoints.quantized.detect import recognise

__all__ = ["recognise"]
