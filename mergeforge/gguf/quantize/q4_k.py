"""Q4_K and Q5_K: blocks of 256 in 8 groups of 32, each with a 6-bit scale and a 6-bit minimum.

Bytes of a block: d and dmin (half precision), 12 with the scales and minima, for Q5_K 32 with the levels' fifth bits,
128 with two 4-bit levels each.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    const_divided_by,
    divided_by_const,
    exact_sqrt,
    half_bytes,
    nearest_int,
    ordered_sum,
    positive_part,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    importance_weights,
    pack_1bit,
    pack_4bit,
    per_block,
    requantize,
)
from mergeforge.gguf.quantize.quant_type import QuantType, register
from mergeforge.gguf.quantize.search_block_scales import fit_block_scales
from mergeforge.gguf.quantize.search_scale_min import (
    ScaleMinFit,
    ScaleMinSearch,
    fit_scale_min,
    importance_search,
    levels_of_fit,
)

if TYPE_CHECKING:
    from torch import Tensor


SEARCHES = {4: ScaleMinSearch(15, -1.0, 0.1, 20), 5: ScaleMinSearch(31, -0.5, 0.1, 15)}


def quantize_torch(bits: int, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows to `bits` 4 or 5 with torch, as ggml's quantize_q4_K() and quantize_q5_K()."""
    import torch

    x = to_groups(rows, 32)
    search = SEARCHES[bits] if importance is None else importance_search(SEARCHES[bits].top)
    if importance is None:
        weight = exact_sqrt(ordered_sum(x * x).div_(32)) + x.abs()
    else:
        weight = importance_weights(rows, importance, 32, 2)
    fit = fit_scale_min(x, weight, search)
    d, dmin, ls, lm = _scales(bits, fit, None if importance is None else ordered_sum(weight))
    step = (d.half().float().unsqueeze(1) * ls).reshape(-1)
    low = (dmin.half().float().unsqueeze(1) * lm).reshape(-1)
    level = requantize(x, step, low, 0, search.top, levels_of_fit(x, fit, search))
    fifth = [pack_1bit(level >> 4)] if bits == 5 else []
    return torch.cat([half_bytes(d), half_bytes(dmin), _pack_scales(ls, lm), *fifth, pack_4bit(level, 32)], 1)


def _scales(bits: int, fit: ScaleMinFit, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, dmin and the levels of the scales and of the minima, blocks x 8."""
    scales, low = per_block(fit.scale, 32), per_block(-fit.minimum, 32)
    if weight is not None:
        w = per_block(weight, 32).t()
        (d, ls), (dmin, lm) = fit_block_scales(scales.t(), w, 63), fit_block_scales(low.t(), w, 63)
        top = 255 if bits == 4 else 63
        return d, dmin, ls.t().clamp(max=top), lm.t().clamp(max=top)
    largest, lowest = positive_part(scales.amax(1)), positive_part(low.amax(1))
    return divided_by_const(largest, 63), divided_by_const(lowest, 63), _sixths(scales, largest), _sixths(low, lowest)


def _sixths(value: Tensor, largest: Tensor) -> Tensor:
    import torch

    inverse = torch.where(largest > 0, const_divided_by(63, largest), torch.zeros_like(largest))
    return (nearest_int(inverse.unsqueeze(1) * value) & 0xFF).clamp_(max=63)


def _pack_scales(ls: Tensor, lm: Tensor) -> Tensor:
    import torch

    first = ls[:, :4] | (ls[:, 4:] >> 4) << 6
    second = lm[:, :4] | (lm[:, 4:] >> 4) << 6
    third = ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4
    return torch.cat([first, second, third], 1).to(torch.uint8)


register(QuantType("Q4_K", 12, BLOCK, 144, partial(quantize_torch, 4)))
register(QuantType("Q5_K", 13, BLOCK, 176, partial(quantize_torch, 5)))
