"""Q3_K: blocks of 256 in 16 groups of 16, each with a signed 6-bit scale.

Bytes of a block: 32 with the levels' third bits, 64 with their lower two bits, 12 with the scales, d (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    LANES,
    const_divided_by,
    half_bytes,
    lane_buffer,
    nearest_int,
    nearest_int_numba,
    ordered_sum,
    signed_absmax,
    store_half,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    MIN,
    STEP,
    STEP_LEVEL,
    WORK_ROWS,
    apply_importance,
    importance_weights,
    pack_1bit,
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
from mergeforge.gguf.quantize.search_scale import (
    SCALE,
    SCALE_ROWS,
    fit_scale,
    fit_scale_lanes,
    fit_scale_numba,
    refine_scale,
    refine_scale_lanes,
    scale_levels_lanes,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Bytes, Floats


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


@kernel
def quantize_numba(x: Floats, importance: Floats, out: Bytes) -> None:
    """Quantize flat rows: `out` is blocks x bytes of a block. An empty `importance` means none."""
    x_t, w_t, wx_t = lane_buffer(16), lane_buffer(16), lane_buffer(16)
    level_t, fit = lane_buffer(16), lane_buffer(SCALE_ROWS)
    total = np.empty(LANES, np.float32)
    work, level = np.empty((WORK_ROWS, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    batch = LANES // 16
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        values = x[first * 256 : (first + count) * 256]
        transpose_groups(values, 16, x_t)
        if importance.size:
            transpose_importance(importance, first * 256, 16, w_t)
            apply_importance(values, x_t, 2.0, 256, w_t)
            sum_weights(w_t, total)
            for i in range(16):
                for g in range(LANES):
                    wx_t[i, g] = w_t[i, g] * x_t[i, g]
            fit_scale_lanes(x_t, w_t, wx_t, 4, fit)
            scale_levels_lanes(x_t, 4, fit, level_t)
        else:
            refine_scale_lanes(x_t, w_t, wx_t, 4, level_t, fit)
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
    step, no_min, scale = work[STEP, :16], work[MIN, :16], work[STEP_LEVEL, :16]
    no_min[:] = np.float32(0)
    for g in range(16):
        step[g] = fit[SCALE, lane + g]
    d = fit_scale_numba(step, total[lane : lane + 16], 32, scale) if weighted else _scale_levels(step, scale)
    d = store_half(out, 108, d)
    _store_scales(scale, out[96:108])
    for g in range(16):
        step[g] = d * (scale[g] - np.float32(32))
    if not requantize_numba(x, step, no_min, -4, 3, work, level):
        restore_zero_step_levels(step, level_t, lane, level)
    pack_2bit_numba(level, out[32:96])
    for j in range(32):
        third = 0
        for k in range(8):
            third |= (level[32 * k + j] >> 2) << k
        out[j] = third


@kernel
def _scale_levels(value: Floats, level: Floats) -> np.float32:
    absmax = np.float32(0)
    for g in range(16):
        absmax = value[g] if abs(value[g]) > abs(absmax) else absmax
    level[:] = np.float32(0)
    if absmax == np.float32(0):
        return np.float32(0)
    inverse = np.float32(-32) / absmax
    for g in range(16):
        level[g] = np.float32(min(31, max(-32, nearest_int_numba(inverse * value[g]))) + 32)
    return np.float32(1) / inverse


@kernel
def _store_scales(level: Floats, out: Bytes) -> None:
    for g in range(8):
        out[g] = np.int64(level[g]) & 15 | (np.int64(level[g + 8]) & 15) << 4
    for g in range(4):
        a, b, c, d = np.int64(level[g]), np.int64(level[g + 4]), np.int64(level[g + 8]), np.int64(level[g + 12])
        out[8 + g] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6


register(QuantType("Q3_K", 11, BLOCK, 110, quantize_torch, quantize_numba))
