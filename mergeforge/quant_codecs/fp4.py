"""4-bit codes, two per byte, and the FP4 formats MXFP4 and NVFP4.

Both codes of a byte are looked up together, so each byte costs one memory access.

* MXFP4: E2M1 values; 32 of them share a power of two. gpt-oss stores its experts in it, the lower four bits first
  (transformers' integrations/mxfp4.py, convert_moe_packed_tensors). A product with a power of two is exact.
* NVFP4: E2M1 values; 16 of them share an FP8 scale, and the tensor has a float32 scale. compressed-tensors divides by
  its `weight_global_scale` (compressors/nvfp4), NVIDIA's ModelOpt multiplies by its `weight_scale_2`. The lower four
  bits come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeforge.quant_codecs.fp8 import e8m0_to_float32

if TYPE_CHECKING:
    from torch import Tensor

# FP4 E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4_GROUP = 32  # values that share an exponent
NVFP4_GROUP = 16  # values that share a scale


def byte_table(levels: Sequence[float] | Tensor, *, high_first: bool) -> Tensor:
    """(256,) int64: both float32 values of every byte, the one of the high four bits first or last."""
    import torch

    values = torch.as_tensor(levels, dtype=torch.float32)
    codes = torch.arange(256, device=values.device)
    halves = [values[codes >> 4], values[codes & 15]]
    return torch.stack(halves if high_first else halves[::-1], dim=1).view(torch.int64).flatten()


def unpack_4bit(raw: Tensor, table: Tensor) -> Tensor:
    """The values of packed bytes (uint8, any shape), flat: float32, two per byte."""
    import torch

    return table.index_select(0, raw.flatten().int()).view(torch.float32)


def dequantize_mxfp4(packed: Tensor, exponents: Tensor) -> Tensor:
    """packed (rows, groups * 16) and exponents (rows, groups), both uint8 -> (rows, groups * 32) float32."""
    values = unpack_4bit(packed, byte_table(E2M1, high_first=False).to(packed.device))
    values.view(-1, MXFP4_GROUP).mul_(e8m0_to_float32(exponents).view(-1, 1))
    return values.view(packed.shape[0], -1)


def dequantize_nvfp4(packed: Tensor, scales: Tensor, tensor_scale: Tensor, *, divides: bool) -> Tensor:
    """packed (rows, groups * 8) uint8, scales (rows, groups) FP8, one float32 `tensor_scale` -> (rows, groups * 16)."""
    values = unpack_4bit(packed, byte_table(E2M1, high_first=False).to(packed.device))
    group_scales = scales.float()
    group_scales = group_scales.div_(tensor_scale.view(())) if divides else group_scales.mul_(tensor_scale.view(()))
    values.view(-1, NVFP4_GROUP).mul_(group_scales.view(-1, 1))
    return values.view(packed.shape[0], -1)
