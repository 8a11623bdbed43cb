"""Q4_K and Q5_K: blocks of 256 in 8 groups of 32, each with a 6-bit scale and a 6-bit minimum.

Bytes: d, dmin (half precision), 12 bytes of scales and minima, Q5_K's 32 bytes of fifth bits, 128 bytes of nibbles.
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
    root,
)
from mergeforge.gguf.quantize.k_quants import (
    BLOCK,
    SHIFT_LEVEL,
    SHIFTS,
    STEP,
    STEP_LEVEL,
    WORK_ROWS,
    bit_planes,
    by_block,
    importance_weights,
    keep_levels,
    nibbles,
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

SEARCHES = {4: Search(15, -1.0, 0.1, 20), 5: Search(31, -0.5, 0.1, 15)}


def encoded(bits: int, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as blocks of `bits` 4 or 5, in torch."""
    import torch

    x = grouped(rows, 32)
    how = SEARCHES[bits] if importance is None else weighted(SEARCHES[bits].top)
    if importance is None:
        weight = root(ordered_sum(x * x).div_(32)) + x.abs()
    else:
        weight = importance_weights(rows, importance, 32, 2)
    line = search(x, weight, how)
    d, dmin, ls, lm = _scales(bits, line, None if importance is None else ordered_sum(weight))
    step = (d.half().float().unsqueeze(1) * ls).reshape(-1)
    low = (dmin.half().float().unsqueeze(1) * lm).reshape(-1)
    level = requantized(x, step, low, 0, how.top, levels_of(x, line, how))
    fifth = [bit_planes(level >> 4)] if bits == 5 else []
    return torch.cat([half_bytes(d), half_bytes(dmin), _packed_scales(ls, lm), *fifth, nibbles(level, 32)], 1)


def _scales(bits: int, line: Line, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, dmin and the levels of the scales and minima, blocks x 8."""
    found, low = by_block(line.scale, 32), by_block(-line.low, 32)
    if weight is not None:
        w = by_block(weight, 32).t()
        (d, ls), (dmin, lm) = search_block_scales.search(found.t(), w, 63), search_block_scales.search(low.t(), w, 63)
        most = 255 if bits == 4 else 63
        return d, dmin, ls.t().clamp(max=most), lm.t().clamp(max=most)
    largest, lowest = positive(found.amax(1)), positive(low.amax(1))
    return divided(largest, 63), divided(lowest, 63), _sixths(found, largest), _sixths(low, lowest)


def _sixths(value: Tensor, largest: Tensor) -> Tensor:
    import torch

    inverse = torch.where(largest > 0, quotient(63, largest), torch.zeros_like(largest))
    return (nearest(inverse.unsqueeze(1) * value) & 0xFF).clamp_(max=63)


def _packed_scales(ls: Tensor, lm: Tensor) -> Tensor:
    import torch

    first = ls[:, :4] | (ls[:, 4:] >> 4) << 6
    second = lm[:, :4] | (lm[:, 4:] >> 4) << 6
    third = ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4
    return torch.cat([first, second, third], 1).to(torch.uint8)


@kernel
def encode_blocks(bits: int, x: Floats, importance: Floats, out: Bytes) -> None:
    """Rows, flat, as blocks of `bits` 4 or 5: out is blocks x bytes. `importance` may be empty."""
    top = 15 if bits == 4 else 31
    x_t, w_t = lanes(32), lanes(32)
    level_t, found = lanes(32), lanes(ROWS)
    total = np.empty(LANES, np.float32)
    work, level = np.empty((WORK_ROWS, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    batch = LANES // 8
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        part = x[first * 256 : (first + count) * 256]
        take_groups(part, 32, x_t)
        if importance.size:
            take_importance(importance, first * 256, 32, w_t)
            weigh(part, x_t, 2.0, 256, w_t)
            sum_weights(w_t, total)
            search_lanes(x_t, w_t, top, -0.9, 0.05, 36, False, True, level_t, found)
        else:
            _weigh_plain(x_t, w_t)
            search_lanes(
                x_t, w_t, top, -1.0 if bits == 4 else -0.5, 0.1, 20 if bits == 4 else 15, False, False, level_t, found
            )
        levels_lanes(x_t, top, importance.size > 0, found, level_t)
        for b in range(count):
            _put_block(
                bits,
                part[b * 256 : (b + 1) * 256],
                8 * b,
                importance.size > 0,
                found,
                total,
                level_t,
                work,
                level,
                out[first + b],
            )


@kernel
def _weigh_plain(x_t: Floats, w_t: Floats) -> None:
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
def _put_block(
    bits: int,
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
    step, low, ls, lm = work[STEP, :8], work[SHIFTS, :8], work[STEP_LEVEL, :8], work[SHIFT_LEVEL, :8]
    for g in range(8):
        step[g] = found[SCALE, lane + g]
        low[g] = -found[LOW, lane + g]
    if weighted:
        d, dmin = fit_scales(step, total[lane : lane + 8], 63, ls), fit_scales(low, total[lane : lane + 8], 63, lm)
        if bits == 5:
            ls[:], lm[:] = np.minimum(ls, np.float32(63)), np.minimum(lm, np.float32(63))
    else:
        d, dmin = _sixth_levels(step, ls), _sixth_levels(low, lm)
    d, dmin = put_half(out, 0, d), put_half(out, 2, dmin)
    _put_scales(ls, lm, out)
    for g in range(8):
        step[g] = d * ls[g]
        low[g] = dmin * lm[g]
    if not requantize(x, step, low, 0, 15 if bits == 4 else 31, work, level):
        keep_levels(step, level_t, lane, level)
    _put_levels(bits, level, out)


@kernel
def _sixth_levels(value: Floats, level: Floats) -> np.float32:
    largest = np.float32(0)
    for g in range(8):
        largest = value[g] if value[g] > largest else largest
    inverse = np.float32(63) / largest if largest > np.float32(0) else np.float32(0)
    for g in range(8):
        level[g] = np.float32(min(63, nearest_level(inverse * value[g]) & 0xFF))
    return largest / np.float32(63)


@kernel
def _put_scales(ls: Floats, lm: Floats, out: Bytes) -> None:
    for g in range(4):
        low, high = np.int64(ls[g]), np.int64(ls[g + 4])
        out[4 + g] = low | (high >> 4) << 6
        m_low, m_high = np.int64(lm[g]), np.int64(lm[g + 4])
        out[8 + g] = m_low | (m_high >> 4) << 6
        out[12 + g] = high & 15 | (m_high & 15) << 4


@kernel
def _put_levels(bits: int, level: Bytes, out: Bytes) -> None:
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
