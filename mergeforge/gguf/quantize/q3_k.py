"""Q3_K: blocks of 256 in 16 groups of 16, each with a signed 6-bit scale.

Bytes of a block: 32 with the levels' third bits, 64 with their lower two bits, 12 with the scales, d (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    const_divided_by,
    half_bytes,
    nearest_int,
    ordered_sum,
    signed_absmax,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    importance_weights,
    pack_1bit,
    pack_2bit,
    per_block,
    requantize,
)
from mergeforge.gguf.quantize.quant_type import QuantType, register
from mergeforge.gguf.quantize.search_scale import (
    fit_scale,
    refine_scale,
)

if TYPE_CHECKING:
    from torch import Tensor


def quantize_torch(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q3_K()."""
    import torch

    x = to_groups(rows, 16)
    if importance is None:
        fit = refine_scale(x, 4)
        d, scale = _scales(per_block(fit.scale, 16))
    else:
        weight = importance_weights(rows, importance, 16, 2)
        fit = fit_scale(x, weight, 4)
        block = fit_scale(
            per_block(fit.scale, 16).t().contiguous(), per_block(ordered_sum(weight), 16).t().contiguous(), 32
        )
        d, scale = block.scale, block.level.t().to(torch.int32)
    # In a block of zeros the scales are stored as 0, which means -32, and d is 0.
    step = (d.half().float().unsqueeze(1) * (scale - 32)).reshape(-1)
    level = requantize(x, step, None, -4, 3, fit.level)
    low = torch.cat([pack_2bit(level[:, :128]), pack_2bit(level[:, 128:])], 1)
    return torch.cat([pack_1bit(level >> 2), low, _pack_scales(scale), half_bytes(d)], 1)


def _scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """d and the scales as levels 0 to 63, blocks x 16; all levels are 0 where all scales are 0."""
    import torch

    absmax = signed_absmax(scales.t())
    inverse = const_divided_by(-32, absmax)
    level = nearest_int(inverse.unsqueeze(1) * scales).clamp_(-32, 31).add_(32)
    is_zero = absmax == 0
    d = torch.where(is_zero, torch.zeros_like(absmax), const_divided_by(1, inverse))
    return d, torch.where(is_zero.unsqueeze(1), torch.zeros_like(level), level)


def _pack_scales(level: Tensor) -> Tensor:
    import torch

    low = level[:, :8] & 15 | (level[:, 8:] & 15) << 4
    high = level >> 4
    top = high[:, :4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:] << 6
    return torch.cat([low, top], 1).to(torch.uint8)


register(QuantType("Q3_K", 11, BLOCK, 110, quantize_torch))
