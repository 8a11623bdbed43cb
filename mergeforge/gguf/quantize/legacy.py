"""Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 with one scale; the _1 types have a minimum too.

Bytes: d and the minimum (half precision), for 5 bits the fifth bits, 16 bytes of nibbles. Without an
importance vector nothing is searched: the range, or the largest element, gives the scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize import search_scale, search_scale_min
from mergeforge.gguf.quantize.ggml_rounding import (
    LANES,
    divided,
    first_lowest,
    first_peak,
    grouped,
    half_bytes,
    lanes,
    ordered_sum,
    positive,
    put_half,
    quotient,
    root,
)
from mergeforge.gguf.quantize.k_quants import importance_groups, nibbles, sum_of_squares, take_groups, take_importance
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.search_scale import ROWS as SYMMETRIC_ROWS
from mergeforge.gguf.quantize.search_scale import SCALE as SYMMETRIC_SCALE
from mergeforge.gguf.quantize.search_scale import levels_lanes as symmetric_levels
from mergeforge.gguf.quantize.search_scale import search_lanes as symmetric_search
from mergeforge.gguf.quantize.search_scale_min import LOW
from mergeforge.gguf.quantize.search_scale_min import ROWS as AFFINE_ROWS
from mergeforge.gguf.quantize.search_scale_min import SCALE as AFFINE_SCALE
from mergeforge.gguf.quantize.search_scale_min import levels_lanes as affine_levels
from mergeforge.gguf.quantize.search_scale_min import search_lanes as affine_search

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Bytes, Floats


def encoded(bits: int, with_low: bool, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as blocks, in torch."""
    import torch

    x = grouped(rows, 32)
    if importance is None:
        d, low, level = _ranged(x, bits) if with_low else _peaked(x, bits)
    else:
        d, low, level = _searched(rows, importance, x, bits, with_low)
    level = level.to(torch.uint8).t().contiguous()
    parts = [half_bytes(d)]
    parts += [half_bytes(low)] if with_low else []
    parts += [_fifth_bits(level)] if bits == 5 else []
    return torch.cat([*parts, nibbles(level, 16)], 1)


def _peaked(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    half = 1 << (bits - 1)
    peak = first_peak(x)
    d = divided(peak, -half)
    return d, d, _truncated(x, d, half + 0.5, 2 * half - 1)


def _ranged(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = (1 << bits) - 1
    low = first_lowest(x)
    d = positive(divided(x.amax(0) - low, top))  # of zeros of both signs not -0
    return d, low, _truncated(x - low, d, 0.5, top)


def _truncated(x: Tensor, d: Tensor, shift: float, top: int) -> Tensor:
    import torch

    inverse = torch.where(d != 0, quotient(1, d), torch.zeros_like(d))
    level = (x * inverse).add_(shift).trunc_().clamp_(max=top)
    return torch.where(inverse.isinf(), torch.zeros_like(level), level)  # C's conversion of inf and NaN


def _searched(rows: Tensor, importance: Tensor, x: Tensor, bits: int, with_low: bool) -> tuple[Tensor, Tensor, Tensor]:
    sigma2 = divided(ordered_sum((rows * rows).t()), rows.shape[1]).repeat_interleave(rows.shape[1] // 32)
    weight = root(sigma2 + x * x).mul_(importance_groups(rows, importance, 32))
    if with_low:
        how = search_scale_min.weighted((1 << bits) - 1)
        line = search_scale_min.search(x, weight, how)
        return line.scale, line.low, search_scale_min.levels_of(x, line, how)
    ray = search_scale.search(x, weight, 1 << (bits - 1))
    return ray.scale, ray.scale, ray.level


def _fifth_bits(level: Tensor) -> Tensor:
    import torch

    bit = (level >> 4).reshape(-1, 4, 8)
    place = torch.arange(8, dtype=torch.uint8, device=level.device)
    return (bit << place).sum(2, dtype=torch.uint8)


@kernel
def encode_blocks(bits: int, with_low: bool, x: Floats, importance: Floats, out: Bytes) -> None:
    """Rows, flat, as blocks: out is blocks x bytes. `importance` may be empty."""
    if importance.size:
        _encode_searched(bits, with_low, x, importance, out)
        return
    level = np.empty(32, np.uint8)
    for b in range(out.shape[0]):
        part = x[32 * b : 32 * b + 32]
        if with_low:
            low, high = _range(part)
            d = (high - low) / np.float32((1 << bits) - 1)
            put_half(out[b], 2, low)
            _truncate(part, low, d, np.float32(0.5), (1 << bits) - 1, level)
        else:
            d = _peak(part) / np.float32(-(1 << (bits - 1)))
            _truncate(part, np.float32(0), d, np.float32((1 << (bits - 1)) + 0.5), (1 << bits) - 1, level)
        put_half(out[b], 0, d)
        _put_levels(bits, level, out[b])


@kernel
def _encode_searched(bits: int, with_low: bool, x: Floats, importance: Floats, out: Bytes) -> None:
    x_t, w_t, wx_t = (
        lanes(32),
        lanes(32),
        lanes(32),
    )
    level_t, level = lanes(32), np.empty(32, np.uint8)
    line, ray = lanes(AFFINE_ROWS), lanes(SYMMETRIC_ROWS)
    sigma2 = _row_sigmas(x, importance.size)
    top = (1 << bits) - 1
    for first in range(0, out.shape[0], LANES):
        count = min(LANES, out.shape[0] - first)
        take_groups(x[first * 32 : (first + count) * 32], 32, x_t)
        take_importance(importance, first * 32, 32, w_t)
        _weigh(sigma2, first * 32, importance.size, x_t, w_t, wx_t)
        if with_low:
            affine_search(x_t, w_t, top, -0.9, 0.05, 36, False, True, level_t, line)
            affine_levels(x_t, top, True, line, level_t)
        else:
            symmetric_search(x_t, w_t, wx_t, (top + 1) // 2, ray)
            symmetric_levels(x_t, (top + 1) // 2, ray, level_t)
        for b in range(count):
            put_half(out[first + b], 0, line[AFFINE_SCALE, b] if with_low else ray[SYMMETRIC_SCALE, b])
            if with_low:
                put_half(out[first + b], 2, line[LOW, b])
            for i in range(32):
                level[i] = np.uint8(level_t[i, b])
            _put_levels(bits, level, out[first + b])


@kernel
def _row_sigmas(x: Floats, columns: int) -> Floats:
    sigma2 = np.empty(x.size // columns, np.float32)
    for row in range(sigma2.size):
        sigma2[row] = sum_of_squares(x[row * columns : (row + 1) * columns]) / np.float32(columns)
    return sigma2


@kernel
def _weigh(sigma2: Floats, start: int, columns: int, x_t: Floats, w_t: Floats, wx_t: Floats) -> None:
    of_lane = np.empty(LANES, np.float32)
    for g in range(LANES):
        of_lane[g] = sigma2[min((start + 32 * g) // columns, sigma2.size - 1)]
    for i in range(32):
        for g in range(LANES):
            w_t[i, g] *= np.sqrt(of_lane[g] + x_t[i, g] * x_t[i, g])
            wx_t[i, g] = w_t[i, g] * x_t[i, g]


@kernel
def _peak(x: Floats) -> np.float32:
    """The first element of the largest magnitude."""
    bits = x.view(np.int32)
    largest = np.int32(0)
    for i in range(32):  # as integers: a maximum of floats would not fill vector registers
        magnitude = np.int32(bits[i] & np.int32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    for i in range(32):
        if np.int32(bits[i] & np.int32(0x7FFFFFFF)) == largest:
            return x[i] if largest else np.float32(0)
    return np.float32(0)


@kernel
def _range(x: Floats) -> tuple[np.float32, np.float32]:
    """The smallest element (of zeros the first) and the largest."""
    bits = x.view(np.int32)
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(32):  # as integers that are ordered as the floats are
        key = np.int32(bits[i] ^ np.int32((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low = key if key < low else low
        high = key if key > high else high
    lowest = np.int32(low ^ np.int32((low >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
    highest = np.int32(high ^ np.int32((high >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
    if lowest == np.float32(0):
        for i in range(32):
            if x[i] == np.float32(0):
                return x[i], highest
    return lowest, highest


@kernel
def _truncate(x: Floats, low: np.float32, d: np.float32, shift: np.float32, top: int, level: Bytes) -> None:
    inverse = np.float32(1) / d if d != np.float32(0) else np.float32(0)
    if abs(inverse) == np.float32(np.inf):  # C's conversion of inf and NaN
        level[:] = 0
        return
    most = np.int32(top)
    for i in range(32):
        q = np.int32((x[i] - low) * inverse + shift)
        level[i] = np.uint8(q if q < most else most)


@kernel
def _put_levels(bits: int, level: Bytes, out: Bytes) -> None:
    start = out.size - 16
    for j in range(16):
        out[start + j] = level[j] & 15 | (level[j + 16] & 15) << 4
    if bits == 5:
        for k in range(4):
            fifth = 0
            for j in range(8):
                fifth |= (level[8 * k + j] >> 4) << j
            out[start - 4 + k] = fifth
