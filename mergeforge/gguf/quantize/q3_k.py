"""Q3_K: blocks of 256 in 16 groups of 16, each with a signed 6-bit scale.

Bytes: 32 of third bits, 64 of the lower two bits, 12 of scales, d (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import (
    LANES,
    first_peak,
    grouped,
    half_bytes,
    lanes,
    nearest,
    nearest_level,
    ordered_sum,
    put_half,
    quotient,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    SHIFTS,
    STEP,
    STEP_LEVEL,
    WORK_ROWS,
    bit_planes,
    by_block,
    importance_weights,
    keep_levels,
    put_quarters,
    quarters,
    requantize,
    requantized,
    sum_weights,
    take_groups,
    take_importance,
    weigh,
)
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.search_scale import (
    ROWS,
    SCALE,
    fit_one,
    improve,
    improve_lanes,
    levels_lanes,
    search,
    search_lanes,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Bytes, Floats


def encoded(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as blocks, in torch."""
    import torch

    x = grouped(rows, 16)
    if importance is None:
        ray = improve(x, 4)
        d, scale = _scales(by_block(ray.scale, 16))
    else:
        weight = importance_weights(rows, importance, 16, 2)
        ray = search(x, weight, 4)
        block = search(by_block(ray.scale, 16).t().contiguous(), by_block(ordered_sum(weight), 16).t().contiguous(), 32)
        d, scale = block.scale, block.level.t().to(torch.int32)
    # A block of zeros has the bytes 0, which mean -32; its d is 0.
    step = (d.half().float().unsqueeze(1) * (scale - 32)).reshape(-1)
    level = requantized(x, step, None, -4, 3, ray.level)
    low = torch.cat([quarters(level[:, :128]), quarters(level[:, 128:])], 1)
    return torch.cat([bit_planes(level >> 2), low, _packed_scales(scale), half_bytes(d)], 1)


def _scales(found: Tensor) -> tuple[Tensor, Tensor]:
    """d and the levels 0 to 63 of the scales, blocks x 16; zeros where all scales are 0."""
    import torch

    peak = first_peak(found.t())
    inverse = quotient(-32, peak)
    level = nearest(inverse.unsqueeze(1) * found).clamp_(-32, 31).add_(32)
    none = peak == 0
    d = torch.where(none, torch.zeros_like(peak), quotient(1, inverse))
    return d, torch.where(none.unsqueeze(1), torch.zeros_like(level), level)


def _packed_scales(level: Tensor) -> Tensor:
    import torch

    low = level[:, :8] & 15 | (level[:, 8:] & 15) << 4
    high = level >> 4
    top = high[:, :4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:] << 6
    return torch.cat([low, top], 1).to(torch.uint8)


@kernel
def encode_blocks(x: Floats, importance: Floats, out: Bytes) -> None:
    """Rows, flat, as blocks: out is blocks x bytes. `importance` may be empty."""
    x_t, w_t, wx_t = (
        lanes(16),
        lanes(16),
        lanes(16),
    )
    level_t, found = lanes(16), lanes(ROWS)
    total = np.empty(LANES, np.float32)
    work, level = np.empty((WORK_ROWS, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    batch = LANES // 16
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        part = x[first * 256 : (first + count) * 256]
        take_groups(part, 16, x_t)
        if importance.size:
            take_importance(importance, first * 256, 16, w_t)
            weigh(part, x_t, 2.0, 256, w_t)
            sum_weights(w_t, total)
            for i in range(16):
                for g in range(LANES):
                    wx_t[i, g] = w_t[i, g] * x_t[i, g]
            search_lanes(x_t, w_t, wx_t, 4, found)
            levels_lanes(x_t, 4, found, level_t)
        else:
            improve_lanes(x_t, w_t, wx_t, 4, level_t, found)
        for b in range(count):
            _put_block(
                part[b * 256 : (b + 1) * 256],
                16 * b,
                importance.size > 0,
                found,
                total,
                level_t,
                work,
                level,
                out[first + b],
            )


@kernel
def _put_block(
    x: Floats,
    lane: int,
    weighted: bool,
    found: Floats,
    total: Floats,
    level_t: Floats,
    work: Floats,
    level: Bytes,
    out: Bytes,
) -> None:
    step, none, scale = work[STEP, :16], work[SHIFTS, :16], work[STEP_LEVEL, :16]
    none[:] = np.float32(0)
    for g in range(16):
        step[g] = found[SCALE, lane + g]
    d = fit_one(step, total[lane : lane + 16], 32, scale) if weighted else _scale_levels(step, scale)
    d = put_half(out, 108, d)
    _put_scales(scale, out[96:108])
    for g in range(16):
        step[g] = d * (scale[g] - np.float32(32))
    if not requantize(x, step, none, -4, 3, work, level):
        keep_levels(step, level_t, lane, level)
    put_quarters(level, out[32:96])
    for j in range(32):
        third = 0
        for k in range(8):
            third |= (level[32 * k + j] >> 2) << k
        out[j] = third


@kernel
def _scale_levels(value: Floats, level: Floats) -> np.float32:
    peak = np.float32(0)
    for g in range(16):
        peak = value[g] if abs(value[g]) > abs(peak) else peak
    level[:] = np.float32(0)
    if peak == np.float32(0):
        return np.float32(0)
    inverse = np.float32(-32) / peak
    for g in range(16):
        level[g] = np.float32(min(31, max(-32, nearest_level(inverse * value[g]))) + 32)
    return np.float32(1) / inverse


@kernel
def _put_scales(level: Floats, out: Bytes) -> None:
    for g in range(8):
        out[g] = np.int64(level[g]) & 15 | (np.int64(level[g + 8]) & 15) << 4
    for g in range(4):
        a, b, c, d = np.int64(level[g]), np.int64(level[g + 4]), np.int64(level[g + 8]), np.int64(level[g + 12])
        out[8 + g] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6
