"""IQ4_NL and IQ4_XS: levels on 16 uneven values. Blocks of 32, or of 256 in 8 groups with 6-bit scales.

IQ4_NL's bytes: d (half precision), 16 of nibbles. IQ4_XS's: d, 2 of the scales' upper two bits, 4 of
their lower nibbles, 128 of nibbles. ggml finds the nearest value by bisection; here an element's level
is how many of the midpoints are not above it, which is the same number (midpoints are exact).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import (
    EPSILON,
    LANES,
    divided,
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
from mergeforge.gguf.quantize.k_quants import by_block, importance_weights, nibbles, take_groups, take_importance, weigh
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.search_scale import PEAK, peaks_lanes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Bytes, Floats

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIDPOINTS = tuple((a + b) / 2 for a, b in pairwise(VALUES))
PLACES = 7  # the largest element is tried on -127 - 7 to -127 + 7


def encoded(block: int, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as blocks of 32 (IQ4_NL) or 256 (IQ4_XS), in torch."""
    import torch

    x = grouped(rows, 32)
    weight = x * x if importance is None else importance_weights(rows, importance, 32, 2, block)
    scale = search(x, weight)
    if block == 32:
        return torch.cat([half_bytes(scale), nibbles(_levels(x, _inverse(scale)), 16)], 1)
    found = by_block(scale, 32)
    d = divided(-first_peak(found.t()), 32)
    level = nearest(_inverse(d).unsqueeze(1) * found).clamp_(-32, 31)
    step = (d.unsqueeze(1) * level).reshape(-1)
    packed = nibbles(_levels(x, _inverse(step)), 16).reshape(len(d), -1)
    return torch.cat([half_bytes(d), _packed_scales(level + 32), packed], 1)


def search(x: Tensor, weight: Tensor) -> Tensor:
    """The scale of every group of x (n x N) with the least weighted error."""
    import torch

    peak = first_peak(x)
    sum_qx, sum_q2 = _sums(x, weight, quotient(1, divided(-peak, VALUES[0])))
    scale = torch.where(sum_q2 > 0, sum_qx / sum_q2, torch.zeros_like(peak))
    best = scale * sum_qx
    for place in range(-PLACES, PLACES + 1):
        sum_qx, sum_q2 = _sums(x, weight, quotient(place + VALUES[0], peak))
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
    return torch.where(peak.abs() < EPSILON, torch.zeros_like(scale), scale)


def _sums(x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    values = torch.tensor(VALUES, dtype=torch.float32, device=x.device)
    value = values[_index(inverse * x)]
    product = weight * value
    return ordered_sum(product * x), ordered_sum(product.mul_(value))


def _index(value: Tensor) -> Tensor:
    import torch

    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float32, device=value.device)
    return torch.bucketize(value, midpoints, right=True)


def _levels(x: Tensor, inverse: Tensor) -> Tensor:
    import torch

    return _index(inverse * x).to(torch.uint8).t().contiguous()


def _inverse(value: Tensor) -> Tensor:
    import torch

    return torch.where(value != 0, quotient(1, value), torch.zeros_like(value))


def _packed_scales(level: Tensor) -> Tensor:
    import torch

    high, low = level >> 4, level & 15
    pairs = [
        high[:, 4 * k] | high[:, 4 * k + 1] << 2 | high[:, 4 * k + 2] << 4 | high[:, 4 * k + 3] << 6 for k in range(2)
    ]
    return torch.cat([torch.stack(pairs, 1), low[:, ::2] | low[:, 1::2] << 4], 1).to(torch.uint8)


# The rows of a kernel's `found`; PEAK is symmetric's.
SCALE, BEST, SUM_QX, SUM_Q2, TRIED = 0, 1, 3, 4, 5


@kernel
def encode_blocks(block: int, x: Floats, importance: Floats, out: Bytes) -> None:
    """Rows, flat, as blocks of 32 or 256: out is blocks x bytes. `importance` may be empty."""
    x_t, w_t = lanes(32), lanes(32)
    found = lanes(6)
    groups = block // 32
    batch = LANES // groups
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        part = x[first * block : (first + count) * block]
        take_groups(part, 32, x_t)
        if importance.size:
            take_importance(importance, first * block, 32, w_t)
            weigh(part, x_t, 2.0, block, w_t)
        else:
            for i in range(32):
                for g in range(LANES):
                    w_t[i, g] = x_t[i, g] * x_t[i, g]
        _search_lanes(x_t, w_t, found)
        for b in range(count):
            scales = found[SCALE, groups * b : groups * (b + 1)]
            if groups == 1:
                _put_single(part[b * 32 : (b + 1) * 32], scales[0], out[first + b])
            else:
                _put_block(part[b * 256 : (b + 1) * 256], scales, out[first + b])


@kernel
def _search_lanes(x: Floats, w: Floats, s: Floats) -> None:
    zero = np.float32(0)
    peaks_lanes(x, s)
    for g in range(LANES):
        s[TRIED, g] = np.float32(1) / (-s[PEAK, g] / np.float32(-127))
    _sum_lanes(x, w, s)
    for g in range(LANES):
        sum_qx, sum_q2 = s[SUM_QX, g], s[SUM_Q2, g]
        scale = sum_qx / sum_q2 if sum_q2 > zero else zero
        s[SCALE, g] = scale
        s[BEST, g] = scale * sum_qx
    for place in range(-PLACES, PLACES + 1):
        for g in range(LANES):
            s[TRIED, g] = np.float32(place - 127) / s[PEAK, g]
        _sum_lanes(x, w, s)
        _accept(s)
    for g in range(LANES):
        s[SCALE, g] = zero if abs(s[PEAK, g]) < np.float32(EPSILON) else s[SCALE, g]


@kernel
def _accept(s: Floats) -> None:
    for g in range(LANES):
        sum_qx, sum_q2 = s[SUM_QX, g], s[SUM_Q2, g]
        gain = sum_qx * sum_qx if sum_q2 > np.float32(0) else np.float32(-1)
        better = gain > s[BEST, g] * sum_q2
        scale = sum_qx / sum_q2
        s[SCALE, g] = scale if better else s[SCALE, g]
        s[BEST, g] = scale * sum_qx if better else s[BEST, g]


@kernel
def _sum_lanes(x: Floats, w: Floats, s: Floats) -> None:
    for g in range(LANES):
        s[SUM_QX, g] = s[SUM_Q2, g] = np.float32(0)
    for i in range(32):
        for g in range(LANES):
            q = _value(s[TRIED, g] * x[i, g])
            product = w[i, g] * q
            s[SUM_QX, g] += product * x[i, g]
            s[SUM_Q2, g] += product * q


@kernel
def _value(v: np.float32) -> np.float32:
    """The nearest of VALUES. Written out, because a loop would keep the caller's from being vectorised."""
    q, none = np.float32(-127), np.float32(0)
    q += np.float32(23) if v >= np.float32(-115.5) else none
    q += np.float32(21) if v >= np.float32(-93.5) else none
    q += np.float32(18) if v >= np.float32(-74.0) else none
    q += np.float32(16) if v >= np.float32(-57.0) else none
    q += np.float32(14) if v >= np.float32(-42.0) else none
    q += np.float32(13) if v >= np.float32(-28.5) else none
    q += np.float32(12) if v >= np.float32(-16.0) else none
    q += np.float32(11) if v >= np.float32(-4.5) else none
    q += np.float32(12) if v >= np.float32(7.0) else none
    q += np.float32(12) if v >= np.float32(19.0) else none
    q += np.float32(13) if v >= np.float32(31.5) else none
    q += np.float32(15) if v >= np.float32(45.5) else none
    q += np.float32(16) if v >= np.float32(61.0) else none
    q += np.float32(20) if v >= np.float32(79.0) else none
    q += np.float32(24) if v >= np.float32(101.0) else none
    return q


@kernel
def _level(v: np.float32) -> np.int32:
    """The index of the nearest of VALUES."""
    index, one, none = np.int32(0), np.int32(1), np.int32(0)
    index += one if v >= np.float32(-115.5) else none
    index += one if v >= np.float32(-93.5) else none
    index += one if v >= np.float32(-74.0) else none
    index += one if v >= np.float32(-57.0) else none
    index += one if v >= np.float32(-42.0) else none
    index += one if v >= np.float32(-28.5) else none
    index += one if v >= np.float32(-16.0) else none
    index += one if v >= np.float32(-4.5) else none
    index += one if v >= np.float32(7.0) else none
    index += one if v >= np.float32(19.0) else none
    index += one if v >= np.float32(31.5) else none
    index += one if v >= np.float32(45.5) else none
    index += one if v >= np.float32(61.0) else none
    index += one if v >= np.float32(79.0) else none
    index += one if v >= np.float32(101.0) else none
    return index


@kernel
def _put_levels(x: Floats, inverse: np.float32, out: Bytes) -> None:
    level = np.empty(32, np.uint8)
    for i in range(32):
        level[i] = np.uint8(_level(inverse * x[i]))
    for i in range(16):
        out[i] = level[i] | level[i + 16] << 4


@kernel
def _put_single(x: Floats, scale: np.float32, out: Bytes) -> None:
    put_half(out, 0, scale)
    _put_levels(x, np.float32(1) / scale if scale != np.float32(0) else np.float32(0), out[2:])


@kernel
def _put_block(x: Floats, scales: Floats, out: Bytes) -> None:
    zero, peak = np.float32(0), np.float32(0)
    for g in range(8):
        peak = scales[g] if abs(scales[g]) > abs(peak) else peak
    d = -peak / np.float32(32)
    put_half(out, 0, d)
    inverse = np.float32(1) / d if d != zero else zero
    out[2:8] = 0
    for g in range(8):
        level = min(31, max(-32, nearest_level(inverse * scales[g])))
        step = d * np.float32(level)
        _put_levels(
            x[32 * g : 32 * g + 32], np.float32(1) / step if step != zero else zero, out[8 + 16 * g : 24 + 16 * g]
        )
        out[2 + g // 4] |= ((level + 32) >> 4) << (2 * (g % 4))
        out[4 + g // 2] |= ((level + 32) & 15) << (4 * (g % 2))
