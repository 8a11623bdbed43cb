"""MXFP4: E2M1 values, 32 of which share a power of two.

gpt-oss stores its experts so, the lower four bits first (transformers' integrations/mxfp4.py,
convert_moe_packed_tensors). A product with a power of two is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.quant_codecs.fp8 import e8m0_to_float32
from mergeforge.quant_codecs.packed_4bit import E2M1, byte_table, unpack_4bit

if TYPE_CHECKING:
    from torch import Tensor

MXFP4_GROUP = 32


def dequantize_mxfp4(packed: Tensor, exponents: Tensor) -> Tensor:
    """packed (rows, groups * 16) and exponents (rows, groups), both uint8 -> (rows, groups * 32) float32."""
    values = unpack_4bit(packed, byte_table(E2M1, high_first=False).to(packed.device))
    values.view(-1, MXFP4_GROUP).mul_(e8m0_to_float32(exponents).view(-1, 1))
    return values.view(packed.shape[0], -1)
