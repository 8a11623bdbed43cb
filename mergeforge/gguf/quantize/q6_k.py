"""Q6_K: blocks of 256 in 16 groups of 16, each with a signed 8-bit scale.

Bytes: 128 of lower nibbles, 64 of upper two bits, 16 of scales, d (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import (
    EPSILON,
    LANES,
    first_peak,
    grouped,
    half_bytes,
    lanes,
    nearest,
    nearest_level,
    put_half,
    quotient,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    SHIFTS,
    STEP,
    WORK_ROWS,
    by_block,
    importance_groups,
    keep_levels,
    nibbles,
    quarters,
    requantize,
    requantized,
    take_groups,
    take_importance,
)
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.search_scale import ROWS, SCALE, levels_lanes, search, search_lanes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Bytes, Floats


def encoded(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as blocks, in torch."""
    import torch

    x = grouped(rows, 16)
    ray = search(x, x * x if importance is None else importance_groups(rows, importance, 16), 32)
    found = by_block(ray.scale, 16)
    peak = first_peak(found.t())
    inverse = quotient(-128, peak)
    d = quotient(1, inverse)
    scale = nearest(inverse.unsqueeze(1) * found).clamp_(max=127)
    step = (d.half().float().unsqueeze(1) * scale).reshape(-1)
    level = requantized(x, step, None, -32, 31, ray.level)
    low = torch.cat([nibbles(level[:, :128], 64), nibbles(level[:, 128:], 64)], 1)
    high = torch.cat([quarters(level[:, :128] >> 4), quarters(level[:, 128:] >> 4)], 1)
    packed = torch.cat([low, high, scale.to(torch.int8).view(torch.uint8), half_bytes(d)], 1)
    return torch.where((peak.abs() < EPSILON).unsqueeze(1), torch.zeros_like(packed), packed)


@kernel
def encode_blocks(x: Floats, importance: Floats, out: Bytes) -> None:
    """Rows, flat, as blocks: out is blocks x bytes. `importance` may be empty."""
    x_t, w_t, wx_t = (
        lanes(16),
        lanes(16),
        lanes(16),
    )
    level_t, found = lanes(16), lanes(ROWS)
    work, level = np.empty((WORK_ROWS, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    batch = LANES // 16
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        part = x[first * 256 : (first + count) * 256]
        take_groups(part, 16, x_t)
        if importance.size:
            take_importance(importance, first * 256, 16, w_t)
        else:
            for i in range(16):
                for g in range(LANES):
                    w_t[i, g] = x_t[i, g] * x_t[i, g]
        for i in range(16):
            for g in range(LANES):
                wx_t[i, g] = w_t[i, g] * x_t[i, g]
        search_lanes(x_t, w_t, wx_t, 32, found)
        levels_lanes(x_t, 32, found, level_t)
        for b in range(count):
            _put_block(part[b * 256 : (b + 1) * 256], 16 * b, found, level_t, work, level, out[first + b])


@kernel
def _put_block(x: Floats, lane: int, found: Floats, level_t: Floats, work: Floats, level: Bytes, out: Bytes) -> None:
    peak = np.float32(0)
    for g in range(16):
        scale = found[SCALE, lane + g]
        peak = scale if abs(scale) > abs(peak) else peak
    if abs(peak) < np.float32(EPSILON):
        out[:] = 0
        return
    step, none = work[STEP, :16], work[SHIFTS, :16]
    none[:] = np.float32(0)
    inverse = np.float32(-128) / peak
    d = put_half(out, 208, np.float32(1) / inverse)
    for g in range(16):
        scale_level = min(127, nearest_level(inverse * found[SCALE, lane + g]))
        out[192 + g] = scale_level & 0xFF
        step[g] = d * np.float32(scale_level)
    if not requantize(x, step, none, -32, 31, work, level):
        keep_levels(step, level_t, lane, level)
    _put_levels(level, out)


@kernel
def _put_levels(level: Bytes, out: Bytes) -> None:
    for half in range(2):
        for j in range(32):
            a, b = level[128 * half + j], level[128 * half + 32 + j]
            c, d = level[128 * half + 64 + j], level[128 * half + 96 + j]
            out[64 * half + j] = a & 15 | (c & 15) << 4
            out[64 * half + 32 + j] = b & 15 | (d & 15) << 4
            out[128 + 32 * half + j] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6
