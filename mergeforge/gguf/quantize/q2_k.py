"""Q2_K: blocks of 256 in 16 groups of 16, each with a 4-bit scale and a 4-bit minimum.

Bytes of a block: 16 with a scale and a minimum each, 64 with four levels each, d and dmin (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    LANES,
    const_divided_by,
    divided_by_const,
    half_bytes,
    lane_buffer,
    nearest_int,
    nearest_int_numba,
    ordered_sum,
    positive_part,
    store_half,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    MIN,
    MIN_LEVEL,
    STEP,
    STEP_LEVEL,
    WORK_ROWS,
    apply_importance,
    importance_weights,
    pack_2bit,
    pack_2bit_numba,
    per_block,
    requantize,
    requantize_numba,
    restore_zero_step_levels,
    sum_weights,
    transpose_groups,
    transpose_importance,
)
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.quant_type import QuantType, register
from mergeforge.gguf.quantize.search_block_scales import fit_block_scales, fit_block_scales_numba
from mergeforge.gguf.quantize.search_scale_min import (
    MINIMUM,
    SCALE,
    SCALE_MIN_ROWS,
    ScaleMinFit,
    ScaleMinSearch,
    fit_scale_min,
    fit_scale_min_lanes,
    importance_search,
    levels_of_fit,
    scale_min_levels_lanes,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Bytes, Floats

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


@kernel
def quantize_numba(x: Floats, importance: Floats, out: Bytes) -> None:
    """Quantize flat rows: `out` is blocks x bytes of a block. An empty `importance` means none."""
    x_t, w_t = lane_buffer(16), lane_buffer(16)
    level_t, fit = lane_buffer(16), lane_buffer(SCALE_MIN_ROWS)
    total = np.empty(LANES, np.float32)
    work, level = np.empty((WORK_ROWS, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    batch = LANES // 16
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        values = x[first * 256 : (first + count) * 256]
        transpose_groups(values, 16, x_t)
        if importance.size:
            transpose_importance(importance, first * 256, 16, w_t)
            apply_importance(values, x_t, 1.0, 256, w_t)
            sum_weights(w_t, total)
            fit_scale_min_lanes(x_t, w_t, 3, -0.9, 0.05, 36, False, True, level_t, fit)
        else:
            for i in range(16):
                for g in range(LANES):
                    w_t[i, g] = abs(x_t[i, g])
            fit_scale_min_lanes(x_t, w_t, 3, -0.5, 0.1, 15, True, False, level_t, fit)
        scale_min_levels_lanes(x_t, 3, importance.size > 0, fit, level_t)
        for b in range(count):
            _store_block(
                values[b * 256 : (b + 1) * 256],
                16 * b,
                importance.size > 0,
                fit,
                total,
                level_t,
                work,
                level,
                out[first + b],
            )


@kernel
def _store_block(
    x: Floats,
    lane: int,
    weighted: bool,
    fit: Floats,
    total: Floats,
    level_t: Floats,
    work: Floats,
    level: Bytes,
    out: Bytes,
) -> None:
    step, low, ls, lm = work[STEP, :16], work[MIN, :16], work[STEP_LEVEL, :16], work[MIN_LEVEL, :16]
    for g in range(16):
        step[g] = fit[SCALE, lane + g]
        low[g] = -fit[MINIMUM, lane + g]
    if weighted:
        d = fit_block_scales_numba(step, total[lane : lane + 16], 15, ls)
        dmin = fit_block_scales_numba(low, total[lane : lane + 16], 15, lm)
    else:
        d, dmin = _fifteenth_levels(step, ls), _fifteenth_levels(low, lm)
    d, dmin = store_half(out, 80, d), store_half(out, 82, dmin)
    for g in range(16):
        packed = (np.int64(ls[g]) | np.int64(lm[g]) << 4) & 0xFF
        out[g] = packed
        step[g] = d * np.float32(packed & 15)
        low[g] = dmin * np.float32(packed >> 4)
    if not requantize_numba(x, step, low, 0, 3, work, level):
        restore_zero_step_levels(step, level_t, lane, level)
    pack_2bit_numba(level, out[16:80])


@kernel
def _fifteenth_levels(value: Floats, level: Floats) -> np.float32:
    largest = np.float32(0)
    for g in range(16):
        largest = value[g] if value[g] > largest else largest
    level[:] = np.float32(0)
    if largest > np.float32(0):
        inverse = np.float32(15) / largest
        for g in range(16):
            level[g] = np.float32(nearest_int_numba(inverse * value[g]) & 0xFF)
    return largest / np.float32(15)


register(QuantType("Q2_K", 10, BLOCK, 84, quantize_torch, quantize_numba))
