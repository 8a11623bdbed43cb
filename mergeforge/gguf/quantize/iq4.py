"""IQ4_NL and IQ4_XS: 16 unevenly spaced levels. Blocks of 32, or of 256 in 8 groups with 6-bit scales.

Bytes of an IQ4_NL block: d (half precision), 16 with two 4-bit levels each. Of an IQ4_XS block: d, 2 with the scales'
upper two bits, 4 with their lower four bits, 128 with two 4-bit levels each. ggml finds the nearest level by bisection
(best_index_int8). Here the level is the number of midpoints that are not above the element. That is the same number,
because the midpoints are exact in float32.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    GROUP_MAX_EPS,
    LANES,
    const_divided_by,
    divided_by_const,
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
    apply_importance,
    importance_weights,
    pack_4bit,
    per_block,
    transpose_groups,
    transpose_importance,
)
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.quant_type import QuantType, register
from mergeforge.gguf.quantize.search_scale import ABSMAX, absmax_lanes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Bytes, Floats

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIDPOINTS = tuple((a + b) / 2 for a, b in pairwise(VALUES))
OFFSETS = 7  # the element of the largest magnitude is tried at -127 - 7 to -127 + 7


def quantize_torch(block: int, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows to blocks of 32 (IQ4_NL) or 256 (IQ4_XS) with torch, as ggml's quantize_row_iq4_nl_impl()."""
    import torch

    x = to_groups(rows, 32)
    weight = x * x if importance is None else importance_weights(rows, importance, 32, 2, block)
    scale = fit_scale(x, weight)
    if block == 32:
        return torch.cat([half_bytes(scale), pack_4bit(_levels(x, _inverse(scale)), 16)], 1)
    scales = per_block(scale, 32)
    d = divided_by_const(-signed_absmax(scales.t()), 32)
    level = nearest_int(_inverse(d).unsqueeze(1) * scales).clamp_(-32, 31)
    step = (d.unsqueeze(1) * level).reshape(-1)
    packed = pack_4bit(_levels(x, _inverse(step)), 16).reshape(len(d), -1)
    return torch.cat([half_bytes(d), _pack_scales(level + 32), packed], 1)


def fit_scale(x: Tensor, weight: Tensor) -> Tensor:
    """The scale of every group of x (n x N) with the smallest weighted error."""
    import torch

    absmax = signed_absmax(x)
    sum_qx, sum_q2 = _sums(x, weight, const_divided_by(1, divided_by_const(-absmax, VALUES[0])))
    scale = torch.where(sum_q2 > 0, sum_qx / sum_q2, torch.zeros_like(absmax))
    best = scale * sum_qx
    for offset in range(-OFFSETS, OFFSETS + 1):
        sum_qx, sum_q2 = _sums(x, weight, const_divided_by(offset + VALUES[0], absmax))
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
    return torch.where(absmax.abs() < GROUP_MAX_EPS, torch.zeros_like(scale), scale)


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

    return torch.where(value != 0, const_divided_by(1, value), torch.zeros_like(value))


def _pack_scales(level: Tensor) -> Tensor:
    import torch

    high, low = level >> 4, level & 15
    pairs = [
        high[:, 4 * k] | high[:, 4 * k + 1] << 2 | high[:, 4 * k + 2] << 4 | high[:, 4 * k + 3] << 6 for k in range(2)
    ]
    return torch.cat([torch.stack(pairs, 1), low[:, ::2] | low[:, 1::2] << 4], 1).to(torch.uint8)


# The rows of a kernel's `fit`; row ABSMAX is search_scale's.
SCALE, BEST, SUM_QX, SUM_Q2, TRIED = 0, 1, 3, 4, 5


@kernel
def quantize_numba(block: int, x: Floats, importance: Floats, out: Bytes) -> None:
    """Quantize flat rows to blocks of 32 or 256: `out` is blocks x bytes of a block; empty `importance`: none."""
    x_t, w_t = lane_buffer(32), lane_buffer(32)
    fit = lane_buffer(6)
    groups = block // 32
    batch = LANES // groups
    for first in range(0, out.shape[0], batch):
        count = min(batch, out.shape[0] - first)
        values = x[first * block : (first + count) * block]
        transpose_groups(values, 32, x_t)
        if importance.size:
            transpose_importance(importance, first * block, 32, w_t)
            apply_importance(values, x_t, 2.0, block, w_t)
        else:
            for i in range(32):
                for g in range(LANES):
                    w_t[i, g] = x_t[i, g] * x_t[i, g]
        _fit_scale_lanes(x_t, w_t, fit)
        for b in range(count):
            scales = fit[SCALE, groups * b : groups * (b + 1)]
            if groups == 1:
                _store_iq4_nl(values[b * 32 : (b + 1) * 32], scales[0], out[first + b])
            else:
                _store_iq4_xs(values[b * 256 : (b + 1) * 256], scales, out[first + b])


@kernel
def _fit_scale_lanes(x: Floats, w: Floats, fit: Floats) -> None:
    zero = np.float32(0)
    absmax_lanes(x, fit)
    for g in range(LANES):
        fit[TRIED, g] = np.float32(1) / (-fit[ABSMAX, g] / np.float32(-127))
    _sum_lanes(x, w, fit)
    for g in range(LANES):
        sum_qx, sum_q2 = fit[SUM_QX, g], fit[SUM_Q2, g]
        scale = sum_qx / sum_q2 if sum_q2 > zero else zero
        fit[SCALE, g] = scale
        fit[BEST, g] = scale * sum_qx
    for offset in range(-OFFSETS, OFFSETS + 1):
        for g in range(LANES):
            fit[TRIED, g] = np.float32(offset - 127) / fit[ABSMAX, g]
        _sum_lanes(x, w, fit)
        _accept(fit)
    for g in range(LANES):
        fit[SCALE, g] = zero if abs(fit[ABSMAX, g]) < np.float32(GROUP_MAX_EPS) else fit[SCALE, g]


@kernel
def _accept(fit: Floats) -> None:
    for g in range(LANES):
        sum_qx, sum_q2 = fit[SUM_QX, g], fit[SUM_Q2, g]
        gain = sum_qx * sum_qx if sum_q2 > np.float32(0) else np.float32(-1)
        better = gain > fit[BEST, g] * sum_q2
        scale = sum_qx / sum_q2
        fit[SCALE, g] = scale if better else fit[SCALE, g]
        fit[BEST, g] = scale * sum_qx if better else fit[BEST, g]


@kernel
def _sum_lanes(x: Floats, w: Floats, fit: Floats) -> None:
    for g in range(LANES):
        fit[SUM_QX, g] = fit[SUM_Q2, g] = np.float32(0)
    for i in range(32):
        for g in range(LANES):
            q = _value(fit[TRIED, g] * x[i, g])
            product = w[i, g] * q
            fit[SUM_QX, g] += product * x[i, g]
            fit[SUM_Q2, g] += product * q


@kernel
def _value(v: np.float32) -> np.float32:
    """The nearest of VALUES. Written out, because numba does not vectorize the caller's loop around another loop."""
    q, zero = np.float32(-127), np.float32(0)
    q += np.float32(23) if v >= np.float32(-115.5) else zero
    q += np.float32(21) if v >= np.float32(-93.5) else zero
    q += np.float32(18) if v >= np.float32(-74.0) else zero
    q += np.float32(16) if v >= np.float32(-57.0) else zero
    q += np.float32(14) if v >= np.float32(-42.0) else zero
    q += np.float32(13) if v >= np.float32(-28.5) else zero
    q += np.float32(12) if v >= np.float32(-16.0) else zero
    q += np.float32(11) if v >= np.float32(-4.5) else zero
    q += np.float32(12) if v >= np.float32(7.0) else zero
    q += np.float32(12) if v >= np.float32(19.0) else zero
    q += np.float32(13) if v >= np.float32(31.5) else zero
    q += np.float32(15) if v >= np.float32(45.5) else zero
    q += np.float32(16) if v >= np.float32(61.0) else zero
    q += np.float32(20) if v >= np.float32(79.0) else zero
    q += np.float32(24) if v >= np.float32(101.0) else zero
    return q


@kernel
def _level(v: np.float32) -> np.int32:
    """The index of the nearest of VALUES."""
    index, one, zero = np.int32(0), np.int32(1), np.int32(0)
    index += one if v >= np.float32(-115.5) else zero
    index += one if v >= np.float32(-93.5) else zero
    index += one if v >= np.float32(-74.0) else zero
    index += one if v >= np.float32(-57.0) else zero
    index += one if v >= np.float32(-42.0) else zero
    index += one if v >= np.float32(-28.5) else zero
    index += one if v >= np.float32(-16.0) else zero
    index += one if v >= np.float32(-4.5) else zero
    index += one if v >= np.float32(7.0) else zero
    index += one if v >= np.float32(19.0) else zero
    index += one if v >= np.float32(31.5) else zero
    index += one if v >= np.float32(45.5) else zero
    index += one if v >= np.float32(61.0) else zero
    index += one if v >= np.float32(79.0) else zero
    index += one if v >= np.float32(101.0) else zero
    return index


@kernel
def _store_levels(x: Floats, inverse: np.float32, out: Bytes) -> None:
    level = np.empty(32, np.uint8)
    for i in range(32):
        level[i] = np.uint8(_level(inverse * x[i]))
    for i in range(16):
        out[i] = level[i] | level[i + 16] << 4


@kernel
def _store_iq4_nl(x: Floats, scale: np.float32, out: Bytes) -> None:
    store_half(out, 0, scale)
    _store_levels(x, np.float32(1) / scale if scale != np.float32(0) else np.float32(0), out[2:])


@kernel
def _store_iq4_xs(x: Floats, scales: Floats, out: Bytes) -> None:
    zero, absmax = np.float32(0), np.float32(0)
    for g in range(8):
        absmax = scales[g] if abs(scales[g]) > abs(absmax) else absmax
    d = -absmax / np.float32(32)
    store_half(out, 0, d)
    inverse = np.float32(1) / d if d != zero else zero
    out[2:8] = 0
    for g in range(8):
        level = min(31, max(-32, nearest_int_numba(inverse * scales[g])))
        step = d * np.float32(level)
        _store_levels(
            x[32 * g : 32 * g + 32], np.float32(1) / step if step != zero else zero, out[8 + 16 * g : 24 + 16 * g]
        )
        out[2 + g // 4] |= ((level + 32) >> 4) << (2 * (g % 4))
        out[4 + g // 2] |= ((level + 32) & 15) << (4 * (g % 2))


register(QuantType("IQ4_NL", 20, 32, 18, partial(quantize_torch, 32), partial(quantize_numba, 32)))
register(QuantType("IQ4_XS", 23, 256, 136, partial(quantize_torch, 256), partial(quantize_numba, 256)))
