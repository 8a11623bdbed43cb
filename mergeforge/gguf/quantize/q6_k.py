"""Q6_K: blocks of 256 in 16 groups of 16, each with a signed 8-bit scale.

Bytes of a block: 128 with the levels' lower four bits, 64 with their upper two bits, 16 scales, d (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    GROUP_MAX_EPS,
    const_divided_by,
    half_bytes,
    nearest_int,
    signed_absmax,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    importance_groups,
    pack_2bit,
    pack_4bit,
    per_block,
    requantize,
)
from mergeforge.gguf.quantize.quant_type import QuantType, register
from mergeforge.gguf.quantize.search_scale import fit_scale

if TYPE_CHECKING:
    from torch import Tensor


def quantize_torch(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q6_K()."""
    import torch

    x = to_groups(rows, 16)
    fit = fit_scale(x, x * x if importance is None else importance_groups(rows, importance, 16), 32)
    scales = per_block(fit.scale, 16)
    absmax = signed_absmax(scales.t())
    inverse = const_divided_by(-128, absmax)
    d = const_divided_by(1, inverse)
    scale = nearest_int(inverse.unsqueeze(1) * scales).clamp_(max=127)
    step = (d.half().float().unsqueeze(1) * scale).reshape(-1)
    level = requantize(x, step, None, -32, 31, fit.level)
    low = torch.cat([pack_4bit(level[:, :128], 64), pack_4bit(level[:, 128:], 64)], 1)
    high = torch.cat([pack_2bit(level[:, :128] >> 4), pack_2bit(level[:, 128:] >> 4)], 1)
    packed = torch.cat([low, high, scale.to(torch.int8).view(torch.uint8), half_bytes(d)], 1)
    return torch.where((absmax.abs() < GROUP_MAX_EPS).unsqueeze(1), torch.zeros_like(packed), packed)


register(QuantType("Q6_K", 14, BLOCK, 210, quantize_torch))
