"""Q2_K: blocks of 256 in 16 groups of 16, each with a 4-bit scale and a 4-bit minimum.

Bytes: 16 of scales and minima, 64 of levels, d and dmin (half precision).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize import search_block_scales
from mergeforge.gguf.quantize.ggml_rounding import (
    LANES,
    divided,
    grouped,
    half_bytes,
    lanes,
    nearest,
    nearest_level,
    ordered_sum,
    positive,
    put_half,
    quotient,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    SHIFT_LEVEL,
    SHIFTS,
    STEP,
    STEP_LEVEL,
    WORK_ROWS,
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
from mergeforge.gguf.quantize.search_block_scales import fit_scales
from mergeforge.gguf.quantize.search_scale_min import (
    LOW,
    ROWS,
    SCALE,
    Line,
    Search,
    levels_lanes,
    levels_of,
    search,
    search_lanes,
    weighted,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Bytes, Floats

PLAIN = Search(3, -0.5, 0.1, 15, absolute=True)
WEIGHTED = weighted(3)


def encoded(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as blocks, in torch."""
    import torch

    x = grouped(rows, 16)
    how = PLAIN if importance is None else WEIGHTED
    weight = x.abs() if importance is None else importance_weights(rows, importance, 16, 1)
    line = search(x, weight, how)
    d, dmin, packed = _scales(line, None if importance is None else ordered_sum(weight))
    step = (d.half().float().unsqueeze(1) * (packed & 15)).reshape(-1)
    low = (dmin.half().float().unsqueeze(1) * (packed >> 4)).reshape(-1)
    level = requantized(x, step, low, 0, 3, levels_of(x, line, how))
    return torch.cat(
        [packed.to(torch.uint8), quarters(level[:, :128]), quarters(level[:, 128:]), half_bytes(d), half_bytes(dmin)], 1
    )


def _scales(line: Line, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """d, dmin and the byte of each group's scale and minimum, blocks x 16."""
    found, low = by_block(line.scale, 16), by_block(-line.low, 16)
    if weight is not None:
        w = by_block(weight, 16).t()
        (d, ls), (dmin, lm) = search_block_scales.search(found.t(), w, 15), search_block_scales.search(low.t(), w, 15)
        return d, dmin, (ls | lm << 4).t() & 0xFF
    largest, lowest = positive(found.amax(1)), positive(low.amax(1))
    packed = _fifteenths(found, largest) & 0xFF | (_fifteenths(low, lowest) << 4) & 0xFF
    return divided(largest, 15), divided(lowest, 15), packed


def _fifteenths(value: Tensor, largest: Tensor) -> Tensor:
    import torch

    level = nearest(quotient(15, largest).unsqueeze(1) * value)
    return torch.where(largest.unsqueeze(1) > 0, level, torch.zeros_like(level))


@kernel
def encode_blocks(x: Floats, importance: Floats, out: Bytes) -> None:
    """Rows, flat, as blocks: out is blocks x bytes. `importance` may be empty."""
    x_t, w_t = lanes(16), lanes(16)
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
            weigh(part, x_t, 1.0, 256, w_t)
            sum_weights(w_t, total)
            search_lanes(x_t, w_t, 3, -0.9, 0.05, 36, False, True, level_t, found)
        else:
            for i in range(16):
                for g in range(LANES):
                    w_t[i, g] = abs(x_t[i, g])
            search_lanes(x_t, w_t, 3, -0.5, 0.1, 15, True, False, level_t, found)
        levels_lanes(x_t, 3, importance.size > 0, found, level_t)
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
    step, low, ls, lm = work[STEP, :16], work[SHIFTS, :16], work[STEP_LEVEL, :16], work[SHIFT_LEVEL, :16]
    for g in range(16):
        step[g] = found[SCALE, lane + g]
        low[g] = -found[LOW, lane + g]
    if weighted:
        d, dmin = fit_scales(step, total[lane : lane + 16], 15, ls), fit_scales(low, total[lane : lane + 16], 15, lm)
    else:
        d, dmin = _fifteenth_levels(step, ls), _fifteenth_levels(low, lm)
    d, dmin = put_half(out, 80, d), put_half(out, 82, dmin)
    for g in range(16):
        packed = (np.int64(ls[g]) | np.int64(lm[g]) << 4) & 0xFF
        out[g] = packed
        step[g] = d * np.float32(packed & 15)
        low[g] = dmin * np.float32(packed >> 4)
    if not requantize(x, step, low, 0, 3, work, level):
        keep_levels(step, level_t, lane, level)
    put_quarters(level, out[16:80])


@kernel
def _fifteenth_levels(value: Floats, level: Floats) -> np.float32:
    largest = np.float32(0)
    for g in range(16):
        largest = value[g] if value[g] > largest else largest
    level[:] = np.float32(0)
    if largest > np.float32(0):
        inverse = np.float32(15) / largest
        for g in range(16):
            level[g] = np.float32(nearest_level(inverse * value[g]) & 0xFF)
    return largest / np.float32(15)
