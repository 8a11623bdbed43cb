"""Q6_K: blocks of 256 in 16 groups of 16, each with a signed 8-bit scale.

Bytes of a block: 128 with the levels' lower four bits, 64 with their upper two bits, 16 scales, d (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    GROUP_MAX_EPS,
    LANES,
    const_divided_by,
    half_bytes,
    lane_buffer,
    nearest_int,
    nearest_int_numba,
    signed_absmax,
    store_half,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    MIN,
    STEP,
    WORK_ROWS,
    importance_groups,
    pack_2bit,
    pack_4bit,
    per_block,
    requantize,
    requantize_numba,
    restore_zero_step_levels,
    transpose_groups,
    transpose_importance,
)
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.quant_type import QuantType, register
from mergeforge.gguf.quantize.search_scale import SCALE, SCALE_ROWS, fit_scale, fit_scale_lanes, scale_levels_lanes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Bytes, Floats


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


@kernel
def quantize_numba(x: Floats, importance: Floats, out: Bytes) -> None:
    """Quantize flat rows: `out` is blocks x bytes of a block. An empty `importance` means none."""
    x_t, w_t, wx_t = lane_buffer(16), lane_buffer(16), lane_buffer(16)
    level_t, fit = lane_buffer(16), lane_buffer(SCALE_ROWS)
    work, level = np.empty((WORK_ROWS, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    batch = LANES // 16
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        values = x[first * 256 : (first + count) * 256]
        transpose_groups(values, 16, x_t)
        if importance.size:
            transpose_importance(importance, first * 256, 16, w_t)
        else:
            for i in range(16):
                for g in range(LANES):
                    w_t[i, g] = x_t[i, g] * x_t[i, g]
        for i in range(16):
            for g in range(LANES):
                wx_t[i, g] = w_t[i, g] * x_t[i, g]
        fit_scale_lanes(x_t, w_t, wx_t, 32, fit)
        scale_levels_lanes(x_t, 32, fit, level_t)
        for b in range(count):
            _store_block(values[b * 256 : (b + 1) * 256], 16 * b, fit, level_t, work, level, out[first + b])


@kernel
def _store_block(x: Floats, lane: int, fit: Floats, level_t: Floats, work: Floats, level: Bytes, out: Bytes) -> None:
    absmax = np.float32(0)
    for g in range(16):
        scale = fit[SCALE, lane + g]
        absmax = scale if abs(scale) > abs(absmax) else absmax
    if abs(absmax) < np.float32(GROUP_MAX_EPS):
        out[:] = 0
        return
    step, no_min = work[STEP, :16], work[MIN, :16]
    no_min[:] = np.float32(0)
    inverse = np.float32(-128) / absmax
    d = store_half(out, 208, np.float32(1) / inverse)
    for g in range(16):
        scale_level = min(127, nearest_int_numba(inverse * fit[SCALE, lane + g]))
        out[192 + g] = scale_level & 0xFF
        step[g] = d * np.float32(scale_level)
    if not requantize_numba(x, step, no_min, -32, 31, work, level):
        restore_zero_step_levels(step, level_t, lane, level)
    _store_levels(level, out)


@kernel
def _store_levels(level: Bytes, out: Bytes) -> None:
    for half in range(2):
        for j in range(32):
            a, b = level[128 * half + j], level[128 * half + 32 + j]
            c, d = level[128 * half + 64 + j], level[128 * half + 96 + j]
            out[64 * half + j] = a & 15 | (c & 15) << 4
            out[64 * half + 32 + j] = b & 15 | (d & 15) << 4
            out[128 + 32 * half + j] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6


register(QuantType("Q6_K", 14, BLOCK, 210, quantize_torch, quantize_numba))
