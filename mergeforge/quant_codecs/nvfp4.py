"""NVFP4: E2M1 values, 16 of which share an FP8 scale, and the tensor a float32 one.

compressed-tensors divides by its `weight_global_scale` (compressors/nvfp4), NVIDIA's ModelOpt multiplies
by its `weight_scale_2`. The lower four bits come first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.quant_codecs.packed_4bit import E2M1, byte_table, unpack_4bit

if TYPE_CHECKING:
    from torch import Tensor

NVFP4_GROUP = 16


def dequantize_nvfp4(packed: Tensor, scales: Tensor, whole: Tensor, *, divides: bool) -> Tensor:
    """packed (rows, groups * 8) uint8, scales (rows, groups) FP8, whole: one float32 -> (rows, groups * 16)."""
    values = unpack_4bit(packed, byte_table(E2M1, high_first=False).to(packed.device))
    each = scales.float().div_(whole.view(())) if divides else scales.float().mul_(whole.view(()))
    values.view(-1, NVFP4_GROUP).mul_(each.view(-1, 1))
    return values.view(packed.shape[0], -1)
