"""A group's scale alone: x ~ scale * l with whole l in [-top, top - 1], the least weighted error.

ggml's make_qx_quants() (rmse_type 1) and make_q3_quants(): the element of the largest magnitude is put on
level -top, or near it; `search` tries 18 other places for it, `improve` then moves single levels instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import (
    EPSILON,
    LANES,
    MAGIC,
    first_peak,
    levels,
    nearest_level,
    ordered_sum,
    quotient,
)
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Floats

PLACES = [*range(-9, 0), *range(1, 10)]  # the largest element on level -(top + place / 10)


@dataclass(frozen=True, eq=False)
class Ray:
    """What was found for each group: x ~ scale * level; levels are 0 to 2 * top, as float32."""

    scale: Tensor
    level: Tensor


def search(x: Tensor, weight: Tensor, top: int) -> Ray:
    """Fit every group of x (n x N), in torch."""
    import torch

    peak = first_peak(x)
    zero = peak.abs() < EPSILON
    inverse = quotient(-top, peak)
    product = weight * x
    sum_lx, sum_l2 = _sums(levels(inverse * x, -top, top - 1), product, weight)
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, torch.zeros_like(peak))
    best = scale * sum_lx
    for place in PLACES:
        tried = quotient(-float(torch.tensor(0.1) * place + top), peak)
        sum_lx, sum_l2 = _sums(levels(tried * x, -top, top - 1), product, weight)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
        inverse = torch.where(better, tried, inverse)
    level = levels(inverse * x, -top, top - 1).add_(top)
    return Ray(torch.where(zero, torch.zeros_like(scale), scale), torch.where(zero, torch.zeros_like(level), level))


def improve(x: Tensor, top: int) -> Ray:
    """Fit every group by moving one level after the other, at most five times through the group, in torch."""
    import torch

    peak = first_peak(x)
    zero = peak.abs() < EPSILON
    weight = x * x
    level = levels(quotient(-top, peak) * x, -top, top - 1)
    product = weight * x
    sum_lx, sum_l2 = _sums(level, product, weight)
    for _ in range(5):
        before = level.clone()
        for i in range(len(x)):
            less_lx = sum_lx - product[i] * level[i]
            less_l2 = sum_l2 - weight[i] * level[i] * level[i]
            moved = levels(x[i] * less_l2 / less_lx, -top, top - 1)
            new_lx, new_l2 = less_lx + product[i] * moved, less_l2 + weight[i] * moved * moved
            better = (less_lx > 0) & (moved != level[i]) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            level[i] = torch.where(better, moved, level[i])
            sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
        if torch.equal(before, level):
            break
    scale = torch.where((sum_l2 > 0) & ~zero, sum_lx / sum_l2, torch.zeros_like(peak))
    return Ray(scale, torch.where(zero, torch.zeros_like(level), level + top))


def _sums(level: Tensor, product: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ordered_sum(product * level), ordered_sum((weight * level).mul_(level))


# The rows of a kernel's `found` (ROWS x LANES): the first two are the result.
SCALE, INVERSE, PEAK, BEST, SUM_LX, SUM_L2, TRIED = range(7)
ROWS = 7


@kernel
def search_lanes(x: Floats, w: Floats, wx: Floats, top: int, found: Floats) -> None:
    """Fit LANES groups; x, w and wx = w * x are n x LANES."""
    most = np.float32(top)
    peaks_lanes(x, found)
    _try(x, w, wx, most, most, found)
    for g in range(LANES):
        sum_lx, sum_l2 = found[SUM_LX, g], found[SUM_L2, g]
        scale = sum_lx / sum_l2 if sum_l2 != np.float32(0) else np.float32(0)
        found[SCALE, g] = scale
        found[BEST, g] = scale * sum_lx
        found[INVERSE, g] = found[TRIED, g]
    for place in range(-9, 10):
        if place != 0:
            _try(x, w, wx, most, np.float32(most + np.float32(0.1) * np.float32(place)), found)
            _accept(found)
    _drop_zeros(found)


@kernel
def fit_one(x: Floats, w: Floats, top: int, level: Floats) -> np.float32:
    """The scale of one group; `level` gets its levels, 0 to 2 * top."""
    peak = np.float32(0)
    for i in range(x.size):
        peak = x[i] if abs(x[i]) > abs(peak) else peak
    level[:] = np.float32(0)
    if abs(peak) < np.float32(EPSILON):
        return np.float32(0)
    inverse = np.float32(-top) / peak
    sum_lx, sum_l2 = _sums_of(x, w, np.float32(top), inverse)
    scale = sum_lx / sum_l2 if sum_l2 != np.float32(0) else np.float32(0)
    best = scale * sum_lx
    for place in range(-9, 10):
        tried = -np.float32(np.float32(top) + np.float32(0.1) * np.float32(place)) / peak
        sum_lx, sum_l2 = _sums_of(x, w, np.float32(top), tried)
        if place != 0 and sum_l2 > np.float32(0) and sum_lx * sum_lx > best * sum_l2:
            inverse, scale = tried, sum_lx / sum_l2
            best = scale * sum_lx
    for i in range(x.size):
        level[i] = _level(inverse * x[i], np.float32(top)) + np.float32(top)
    return scale


@kernel
def _sums_of(x: Floats, w: Floats, top: np.float32, inverse: np.float32) -> tuple[np.float32, np.float32]:
    sum_lx = sum_l2 = np.float32(0)
    for i in range(x.size):
        level = _level(inverse * x[i], top)
        sum_lx += w[i] * x[i] * level
        sum_l2 += w[i] * level * level
    return sum_lx, sum_l2


@kernel
def levels_lanes(x: Floats, top: int, found: Floats, level: Floats) -> None:
    """The levels that the search ended with, 0 to 2 * top; 0 for groups of zeros."""
    for i in range(x.shape[0]):
        for g in range(LANES):
            inverse = found[INVERSE, g]
            shifted = _level(inverse * x[i, g], np.float32(top)) + np.float32(top)
            level[i, g] = shifted if inverse != np.float32(0) else np.float32(0)


@kernel
def improve_lanes(x: Floats, w: Floats, wx: Floats, top: int, level: Floats, found: Floats) -> None:
    """Fit LANES groups by moving single levels; `level` gets them, 0 to 2 * top, and w and wx their weights."""
    zero, most = np.float32(0), np.float32(top)
    peaks_lanes(x, found)
    _weigh_squares(x, w, wx)
    _try(x, w, wx, most, most, found)
    for g in range(LANES):
        found[INVERSE, g] = found[TRIED, g]
    _drop_zeros(found)
    levels_lanes(x, top, found, level)
    for i in range(x.shape[0]):
        for g in range(LANES):
            level[i, g] -= most
    for _ in range(5):  # ggml stops when nothing moves; then nothing would, either
        _sweep(x, w, wx, top, level, found)
    for g in range(LANES):
        sum_lx, sum_l2 = found[SUM_LX, g], found[SUM_L2, g]
        found[SCALE, g] = sum_lx / sum_l2 if sum_l2 > zero and found[INVERSE, g] != zero else zero
    for i in range(x.shape[0]):
        for g in range(LANES):
            level[i, g] = level[i, g] + most if found[INVERSE, g] != zero else zero


@kernel
def _sweep(x: Floats, w: Floats, wx: Floats, top: int, level: Floats, s: Floats) -> None:
    zero, never, least, most = np.float32(0), np.float32(-1), np.int32(-top), np.int32(top - 1)
    for i in range(x.shape[0]):
        for g in range(LANES):
            old = level[i, g]
            sum_lx, sum_l2 = s[SUM_LX, g], s[SUM_L2, g]
            less_lx = sum_lx - wx[i, g] * old
            less_l2 = sum_l2 - w[i, g] * old * old
            q = nearest_level(np.float32(x[i, g] * less_l2 / less_lx))
            q = q if q < most else most
            new = np.float32(q if q > least else least)
            new_lx = less_lx + wx[i, g] * new
            new_l2 = less_l2 + w[i, g] * new * new
            gain = new_lx * new_lx * sum_l2  # conditions one by one: joined by "and" they would not be vectorised
            gain = gain if less_lx > zero else never
            gain = gain if new != old else never
            gain = gain if new_l2 > zero else never
            better = gain > sum_lx * sum_lx * new_l2
            level[i, g] = new if better else old
            s[SUM_LX, g] = new_lx if better else sum_lx
            s[SUM_L2, g] = new_l2 if better else sum_l2


@kernel
def peaks_lanes(x: Floats, s: Floats) -> None:
    """The first element of the largest magnitude of each group, with its sign, in row PEAK."""
    for g in range(LANES):
        s[PEAK, g] = np.float32(0)
    for i in range(x.shape[0]):
        for g in range(LANES):
            v = x[i, g]
            s[PEAK, g] = v if abs(v) > abs(s[PEAK, g]) else s[PEAK, g]


@kernel
def _weigh_squares(x: Floats, w: Floats, wx: Floats) -> None:
    for i in range(x.shape[0]):
        for g in range(LANES):
            v = x[i, g]
            w[i, g] = v * v
            wx[i, g] = v * v * v


@kernel
def _try(x: Floats, w: Floats, wx: Floats, top: np.float32, place: np.float32, s: Floats) -> None:
    for g in range(LANES):
        s[TRIED, g] = -place / s[PEAK, g]
        s[SUM_LX, g] = s[SUM_L2, g] = np.float32(0)
    for i in range(0, x.shape[0], 2):  # two at a time: storing the sums is what limits
        for g in range(LANES):
            a, b = _level(s[TRIED, g] * x[i, g], top), _level(s[TRIED, g] * x[i + 1, g], top)
            s[SUM_LX, g] = s[SUM_LX, g] + wx[i, g] * a + wx[i + 1, g] * b
            s[SUM_L2, g] = s[SUM_L2, g] + w[i, g] * a * a + w[i + 1, g] * b * b


@kernel
def _level(value: np.float32, top: np.float32) -> np.float32:
    level = np.float32(np.float32(value + np.float32(MAGIC)) - np.float32(MAGIC))
    level = level if level < top - np.float32(1) else top - np.float32(1)
    return level if level > -top else -top


@kernel
def _accept(s: Floats) -> None:
    zero = np.float32(0)
    for g in range(LANES):
        sum_lx, sum_l2 = s[SUM_LX, g], s[SUM_L2, g]
        gain = sum_lx * sum_lx if sum_l2 > zero else np.float32(-1)
        better = gain > s[BEST, g] * sum_l2
        scale = sum_lx / sum_l2
        s[SCALE, g] = scale if better else s[SCALE, g]
        s[BEST, g] = scale * sum_lx if better else s[BEST, g]
        s[INVERSE, g] = s[TRIED, g] if better else s[INVERSE, g]


@kernel
def _drop_zeros(s: Floats) -> None:
    zero = np.float32(0)
    for g in range(LANES):
        none = abs(s[PEAK, g]) < np.float32(EPSILON)
        s[SCALE, g] = zero if none else s[SCALE, g]
        s[INVERSE, g] = zero if none else s[INVERSE, g]
