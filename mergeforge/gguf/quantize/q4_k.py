"""Q4_K and Q5_K: blocks of 256 in 8 groups of 32, each with a 6-bit scale and a 6-bit minimum.

Bytes of a block: d and dmin (half precision), 12 with the scales and minima, for Q5_K 32 with the levels' fifth bits,
128 with two 4-bit levels each.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    LANES,
    const_divided_by,
    divided_by_const,
    exact_sqrt,
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
    pack_1bit,
    pack_4bit,
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


@kernel
def quantize_numba(bits: int, x: Floats, importance: Floats, out: Bytes) -> None:
    """Quantize flat rows to `bits` 4 or 5: `out` is blocks x bytes of a block. An empty `importance` means none."""
    top = 15 if bits == 4 else 31
    x_t, w_t = lane_buffer(32), lane_buffer(32)
    level_t, fit = lane_buffer(32), lane_buffer(SCALE_MIN_ROWS)
    total = np.empty(LANES, np.float32)
    work, level = np.empty((WORK_ROWS, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    batch = LANES // 8
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        values = x[first * 256 : (first + count) * 256]
        transpose_groups(values, 32, x_t)
        if importance.size:
            transpose_importance(importance, first * 256, 32, w_t)
            apply_importance(values, x_t, 2.0, 256, w_t)
            sum_weights(w_t, total)
            fit_scale_min_lanes(x_t, w_t, top, -0.9, 0.05, 36, False, True, level_t, fit)
        else:
            _weights_without_importance(x_t, w_t)
            fit_scale_min_lanes(
                x_t, w_t, top, -1.0 if bits == 4 else -0.5, 0.1, 20 if bits == 4 else 15, False, False, level_t, fit
            )
        scale_min_levels_lanes(x_t, top, importance.size > 0, fit, level_t)
        for b in range(count):
            _store_block(
                bits,
                values[b * 256 : (b + 1) * 256],
                8 * b,
                importance.size > 0,
                fit,
                total,
                level_t,
                work,
                level,
                out[first + b],
            )


@kernel
def _weights_without_importance(x_t: Floats, w_t: Floats) -> None:
    mean = np.zeros(LANES, np.float32)
    for i in range(32):
        for g in range(LANES):
            mean[g] += x_t[i, g] * x_t[i, g]
    for g in range(LANES):
        mean[g] = np.sqrt(mean[g] / np.float32(32))
    for i in range(32):
        for g in range(LANES):
            w_t[i, g] = mean[g] + abs(x_t[i, g])


@kernel
def _store_block(
    bits: int,
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
    step, low, ls, lm = work[STEP, :8], work[MIN, :8], work[STEP_LEVEL, :8], work[MIN_LEVEL, :8]
    for g in range(8):
        step[g] = fit[SCALE, lane + g]
        low[g] = -fit[MINIMUM, lane + g]
    if weighted:
        d = fit_block_scales_numba(step, total[lane : lane + 8], 63, ls)
        dmin = fit_block_scales_numba(low, total[lane : lane + 8], 63, lm)
        if bits == 5:
            ls[:], lm[:] = np.minimum(ls, np.float32(63)), np.minimum(lm, np.float32(63))
    else:
        d, dmin = _sixth_levels(step, ls), _sixth_levels(low, lm)
    d, dmin = store_half(out, 0, d), store_half(out, 2, dmin)
    _store_scales(ls, lm, out)
    for g in range(8):
        step[g] = d * ls[g]
        low[g] = dmin * lm[g]
    if not requantize_numba(x, step, low, 0, 15 if bits == 4 else 31, work, level):
        restore_zero_step_levels(step, level_t, lane, level)
    _store_levels(bits, level, out)


@kernel
def _sixth_levels(value: Floats, level: Floats) -> np.float32:
    largest = np.float32(0)
    for g in range(8):
        largest = value[g] if value[g] > largest else largest
    inverse = np.float32(63) / largest if largest > np.float32(0) else np.float32(0)
    for g in range(8):
        level[g] = np.float32(min(63, nearest_int_numba(inverse * value[g]) & 0xFF))
    return largest / np.float32(63)


@kernel
def _store_scales(ls: Floats, lm: Floats, out: Bytes) -> None:
    for g in range(4):
        low, high = np.int64(ls[g]), np.int64(ls[g + 4])
        out[4 + g] = low | (high >> 4) << 6
        m_low, m_high = np.int64(lm[g]), np.int64(lm[g + 4])
        out[8 + g] = m_low | (m_high >> 4) << 6
        out[12 + g] = high & 15 | (m_high & 15) << 4


@kernel
def _store_levels(bits: int, level: Bytes, out: Bytes) -> None:
    start = 16
    if bits == 5:
        start = 48
        for j in range(32):
            fifth = 0
            for k in range(8):
                fifth |= (level[32 * k + j] >> 4) << k
            out[16 + j] = fifth
    for k in range(4):
        for j in range(32):
            out[start + 32 * k + j] = level[64 * k + j] & 15 | (level[64 * k + 32 + j] & 15) << 4


register(QuantType("Q4_K", 12, BLOCK, 144, partial(quantize_torch, 4), partial(quantize_numba, 4)))
register(QuantType("Q5_K", 13, BLOCK, 176, partial(quantize_torch, 5), partial(quantize_numba, 5)))
