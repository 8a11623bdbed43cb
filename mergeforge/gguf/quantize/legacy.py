"""Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 with one scale; the _1 types also have a minimum.

Bytes of a block: d and, for _1, the minimum (half precision); for 5 bits, 4 bytes with the fifth bits; 16 bytes with
two 4-bit levels each. With an importance vector ggml searches for the scale (make_qx_quants, make_qkx3_quants).
Without one it takes the scale from the block's range or largest element.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    LANES,
    const_divided_by,
    divided_by_const,
    exact_sqrt,
    first_min,
    half_bytes,
    lane_buffer,
    ordered_sum,
    positive_part,
    signed_absmax,
    store_half,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    importance_groups,
    pack_4bit,
    sum_of_squares,
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
    scale_levels_lanes,
)
from mergeforge.gguf.quantize.search_scale_min import (
    MINIMUM,
    SCALE_MIN_ROWS,
    fit_scale_min,
    fit_scale_min_lanes,
    importance_search,
    levels_of_fit,
    scale_min_levels_lanes,
)
from mergeforge.gguf.quantize.search_scale_min import SCALE as MINIMUM_SCALE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Bytes, Floats


def quantize_torch(bits: int, with_min: bool, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q4_0(), quantize_q4_1(), quantize_q5_0() and quantize_q5_1()."""
    import torch

    x = to_groups(rows, 32)
    if importance is None:
        d, low, level = _from_range(x, bits) if with_min else _from_absmax(x, bits)
    else:
        d, low, level = _with_importance(rows, importance, x, bits, with_min)
    level = level.to(torch.uint8).t().contiguous()
    fields = [half_bytes(d)]
    fields += [half_bytes(low)] if with_min else []
    fields += [_pack_fifth_bits(level)] if bits == 5 else []
    return torch.cat([*fields, pack_4bit(level, 16)], 1)


def _from_absmax(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    half = 1 << (bits - 1)
    absmax = signed_absmax(x)
    d = divided_by_const(absmax, -half)
    return d, d, _truncated(x, d, half + 0.5, 2 * half - 1)


def _from_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = (1 << bits) - 1
    low = first_min(x)
    d = positive_part(divided_by_const(x.amax(0) - low, top))  # not -0 when the block holds zeros of both signs
    return d, low, _truncated(x - low, d, 0.5, top)


def _truncated(x: Tensor, d: Tensor, shift: float, top: int) -> Tensor:
    import torch

    inverse = torch.where(d != 0, const_divided_by(1, d), torch.zeros_like(d))
    level = (x * inverse).add_(shift).trunc_().clamp_(max=top)
    return torch.where(inverse.isinf(), torch.zeros_like(level), level)  # what C's conversion of inf and NaN gives


def _with_importance(
    rows: Tensor, importance: Tensor, x: Tensor, bits: int, with_min: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sigma2 = divided_by_const(ordered_sum((rows * rows).t()), rows.shape[1]).repeat_interleave(rows.shape[1] // 32)
    weight = exact_sqrt(sigma2 + x * x).mul_(importance_groups(rows, importance, 32))
    if with_min:
        search = importance_search((1 << bits) - 1)
        min_fit = fit_scale_min(x, weight, search)
        return min_fit.scale, min_fit.minimum, levels_of_fit(x, min_fit, search)
    fit = fit_scale(x, weight, 1 << (bits - 1))
    return fit.scale, fit.scale, fit.level


def _pack_fifth_bits(level: Tensor) -> Tensor:
    import torch

    bit = (level >> 4).reshape(-1, 4, 8)
    bit_index = torch.arange(8, dtype=torch.uint8, device=level.device)
    return (bit << bit_index).sum(2, dtype=torch.uint8)


@kernel
def quantize_numba(bits: int, with_min: bool, x: Floats, importance: Floats, out: Bytes) -> None:
    """Quantize flat rows: `out` is blocks x bytes of a block. An empty `importance` means none."""
    if importance.size:
        _quantize_with_importance(bits, with_min, x, importance, out)
        return
    level = np.empty(32, np.uint8)
    for b in range(out.shape[0]):
        values = x[32 * b : 32 * b + 32]
        if with_min:
            low, high = _min_max(values)
            d = (high - low) / np.float32((1 << bits) - 1)
            store_half(out[b], 2, low)
            _truncate(values, low, d, np.float32(0.5), (1 << bits) - 1, level)
        else:
            d = _signed_absmax(values) / np.float32(-(1 << (bits - 1)))
            _truncate(values, np.float32(0), d, np.float32((1 << (bits - 1)) + 0.5), (1 << bits) - 1, level)
        store_half(out[b], 0, d)
        _store_levels(bits, level, out[b])


@kernel
def _quantize_with_importance(bits: int, with_min: bool, x: Floats, importance: Floats, out: Bytes) -> None:
    x_t, w_t, wx_t = lane_buffer(32), lane_buffer(32), lane_buffer(32)
    level_t, level = lane_buffer(32), np.empty(32, np.uint8)
    min_fit, fit = lane_buffer(SCALE_MIN_ROWS), lane_buffer(SCALE_ROWS)
    sigma2 = _row_mean_squares(x, importance.size)
    top = (1 << bits) - 1
    for first in range(0, out.shape[0], LANES):
        count = min(LANES, out.shape[0] - first)
        transpose_groups(x[first * 32 : (first + count) * 32], 32, x_t)
        transpose_importance(importance, first * 32, 32, w_t)
        _weigh(sigma2, first * 32, importance.size, x_t, w_t, wx_t)
        if with_min:
            fit_scale_min_lanes(x_t, w_t, top, -0.9, 0.05, 36, False, True, level_t, min_fit)
            scale_min_levels_lanes(x_t, top, True, min_fit, level_t)
        else:
            fit_scale_lanes(x_t, w_t, wx_t, (top + 1) // 2, fit)
            scale_levels_lanes(x_t, (top + 1) // 2, fit, level_t)
        for b in range(count):
            store_half(out[first + b], 0, min_fit[MINIMUM_SCALE, b] if with_min else fit[SCALE, b])
            if with_min:
                store_half(out[first + b], 2, min_fit[MINIMUM, b])
            for i in range(32):
                level[i] = np.uint8(level_t[i, b])
            _store_levels(bits, level, out[first + b])


@kernel
def _row_mean_squares(x: Floats, columns: int) -> Floats:
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
def _signed_absmax(x: Floats) -> np.float32:
    """The first element of the largest magnitude, with its sign."""
    bits = x.view(np.int32)
    largest = np.int32(0)
    for i in range(32):  # as integers, because numba does not vectorize a maximum of floats
        magnitude = np.int32(bits[i] & np.int32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    for i in range(32):
        if np.int32(bits[i] & np.int32(0x7FFFFFFF)) == largest:
            return x[i] if largest else np.float32(0)
    return np.float32(0)


@kernel
def _min_max(x: Floats) -> tuple[np.float32, np.float32]:
    """The smallest element (the first one if it is zero) and the largest."""
    bits = x.view(np.int32)
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(32):  # as integers in the order of the floats
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
    if abs(inverse) == np.float32(np.inf):  # what C's conversion of inf and NaN gives
        level[:] = 0
        return
    top_level = np.int32(top)
    for i in range(32):
        q = np.int32((x[i] - low) * inverse + shift)
        level[i] = np.uint8(q if q < top_level else top_level)


@kernel
def _store_levels(bits: int, level: Bytes, out: Bytes) -> None:
    start = out.size - 16
    for j in range(16):
        out[start + j] = level[j] & 15 | (level[j + 16] & 15) << 4
    if bits == 5:
        for k in range(4):
            fifth = 0
            for j in range(8):
                fifth |= (level[8 * k + j] >> 4) << j
            out[start - 4 + k] = fifth


def _register(name: str, number: int, nbytes: int, bits: int, *, with_min: bool) -> None:
    torch_function, kernel_function = partial(quantize_torch, bits, with_min), partial(quantize_numba, bits, with_min)
    register(QuantType(name, number, 32, nbytes, torch_function, kernel_function))


_register("Q4_0", 2, 18, bits=4, with_min=False)
_register("Q4_1", 3, 20, bits=4, with_min=True)
_register("Q5_0", 6, 22, bits=5, with_min=False)
_register("Q5_1", 7, 24, bits=5, with_min=True)
