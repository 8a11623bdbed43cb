"""Q2_K: blocks of 256 in 16 groups of 16, each with a 4-bit scale and a 4-bit minimum.

Bytes of a block: 16 with a scale and a minimum each, 64 with four levels each, d and dmin (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    const_divided_by,
    divided_by_const,
    half_bytes,
    nearest_int,
    ordered_sum,
    positive_part,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    importance_weights,
    pack_2bit,
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


UNWEIGHTED = ScaleMinSearch(3, -0.5, 0.1, 15, absolute=True)
WEIGHTED = importance_search(3)


def quantize_torch(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q2_K()."""
    import torch

    x = to_groups(rows, 16)
    search = UNWEIGHTED if importance is None else WEIGHTED
    weight = x.abs() if importance is None else importance_weights(rows, importance, 16, 1)
    fit = fit_scale_min(x, weight, search)
    d, dmin, packed = _scales(fit, None if importance is None else ordered_sum(weight))
    step = (d.half().float().unsqueeze(1) * (packed & 15)).reshape(-1)
    low = (dmin.half().float().unsqueeze(1) * (packed >> 4)).reshape(-1)
    level = requantize(x, step, low, 0, 3, levels_of_fit(x, fit, search))
    return torch.cat(
        [packed.to(torch.uint8), pack_2bit(level[:, :128]), pack_2bit(level[:, 128:]), half_bytes(d), half_bytes(dmin)],
        1,
    )


def _scales(fit: ScaleMinFit, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """d, dmin and one byte with the scale and minimum of each group, blocks x 16."""
    scales, low = per_block(fit.scale, 16), per_block(-fit.minimum, 16)
    if weight is not None:
        w = per_block(weight, 16).t()
        (d, ls), (dmin, lm) = fit_block_scales(scales.t(), w, 15), fit_block_scales(low.t(), w, 15)
        return d, dmin, (ls | lm << 4).t() & 0xFF
    largest, lowest = positive_part(scales.amax(1)), positive_part(low.amax(1))
    packed = _fifteenths(scales, largest) & 0xFF | (_fifteenths(low, lowest) << 4) & 0xFF
    return divided_by_const(largest, 15), divided_by_const(lowest, 15), packed


def _fifteenths(value: Tensor, largest: Tensor) -> Tensor:
    import torch

    level = nearest_int(const_divided_by(15, largest).unsqueeze(1) * value)
    return torch.where(largest.unsqueeze(1) > 0, level, torch.zeros_like(level))


register(QuantType("Q2_K", 10, BLOCK, 84, quantize_torch))
