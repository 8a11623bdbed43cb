"""The scale of a group without a minimum: x ~ scale * level, level in [-top, top - 1], smallest weighted error.

The element of the largest magnitude gets level -top, or a value near it. `fit_scale` (ggml's make_qx_quants() with
rmse_type 1) tries 18 more values for it. `refine_scale` (ggml's make_q3_quants()) changes single levels instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    GROUP_MAX_EPS,
    LANES,
    ROUNDING_MAGIC,
    const_divided_by,
    levels,
    nearest_int_numba,
    ordered_sum,
    signed_absmax,
)
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Floats

OFFSETS = [*range(-9, 0), *range(1, 10)]  # the element of the largest magnitude at level -(top + offset / 10)


@dataclass(frozen=True, eq=False)
class ScaleFit:
    """The fit of each group: x ~ scale * (level - top), levels 0 to 2 * top - 1 as float32."""

    scale: Tensor
    level: Tensor


def fit_scale(x: Tensor, weight: Tensor, top: int) -> ScaleFit:
    """Fit every group of x (n x N) with torch. ggml: make_qx_quants()."""
    import torch

    absmax = signed_absmax(x)
    is_zero = absmax.abs() < GROUP_MAX_EPS
    inverse = const_divided_by(-top, absmax)
    product = weight * x
    sum_lx, sum_l2 = _sums(levels(inverse * x, -top, top - 1), product, weight)
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, torch.zeros_like(absmax))
    best = scale * sum_lx
    for offset in OFFSETS:
        tried = const_divided_by(-float(torch.tensor(0.1) * offset + top), absmax)
        sum_lx, sum_l2 = _sums(levels(tried * x, -top, top - 1), product, weight)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
        inverse = torch.where(better, tried, inverse)
    level = levels(inverse * x, -top, top - 1).add_(top)
    return ScaleFit(
        torch.where(is_zero, torch.zeros_like(scale), scale), torch.where(is_zero, torch.zeros_like(level), level)
    )


def refine_scale(x: Tensor, top: int) -> ScaleFit:
    """Fit every group by changing one level after another, in at most five passes. ggml: make_q3_quants()."""
    import torch

    absmax = signed_absmax(x)
    is_zero = absmax.abs() < GROUP_MAX_EPS
    weight = x * x
    level = levels(const_divided_by(-top, absmax) * x, -top, top - 1)
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
    scale = torch.where((sum_l2 > 0) & ~is_zero, sum_lx / sum_l2, torch.zeros_like(absmax))
    return ScaleFit(scale, torch.where(is_zero, torch.zeros_like(level), level + top))


def _sums(level: Tensor, product: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ordered_sum(product * level), ordered_sum((weight * level).mul_(level))


# The rows of a kernel's `fit` (SCALE_ROWS x LANES); the first two are the result.
SCALE, INVERSE, ABSMAX, BEST, SUM_LX, SUM_L2, TRIED = range(7)
SCALE_ROWS = 7


@kernel
def fit_scale_lanes(x: Floats, w: Floats, wx: Floats, top: int, fit: Floats) -> None:
    """Fit LANES groups as `fit_scale`; x, w and wx = w * x are n x LANES."""
    top_value = np.float32(top)
    absmax_lanes(x, fit)
    _try(x, w, wx, top_value, top_value, fit)
    for g in range(LANES):
        sum_lx, sum_l2 = fit[SUM_LX, g], fit[SUM_L2, g]
        scale = sum_lx / sum_l2 if sum_l2 != np.float32(0) else np.float32(0)
        fit[SCALE, g] = scale
        fit[BEST, g] = scale * sum_lx
        fit[INVERSE, g] = fit[TRIED, g]
    for offset in range(-9, 10):
        if offset != 0:
            _try(x, w, wx, top_value, np.float32(top_value + np.float32(0.1) * np.float32(offset)), fit)
            _accept(fit)
    _drop_zeros(fit)


@kernel
def fit_scale_numba(x: Floats, w: Floats, top: int, level: Floats) -> np.float32:
    """The scale of one group as `fit_scale`; writes its levels, 0 to 2 * top - 1, to `level`."""
    absmax = np.float32(0)
    for i in range(x.size):
        absmax = x[i] if abs(x[i]) > abs(absmax) else absmax
    level[:] = np.float32(0)
    if abs(absmax) < np.float32(GROUP_MAX_EPS):
        return np.float32(0)
    inverse = np.float32(-top) / absmax
    sum_lx, sum_l2 = _sums_of(x, w, np.float32(top), inverse)
    scale = sum_lx / sum_l2 if sum_l2 != np.float32(0) else np.float32(0)
    best = scale * sum_lx
    for offset in range(-9, 10):
        tried = -np.float32(np.float32(top) + np.float32(0.1) * np.float32(offset)) / absmax
        sum_lx, sum_l2 = _sums_of(x, w, np.float32(top), tried)
        if offset != 0 and sum_l2 > np.float32(0) and sum_lx * sum_lx > best * sum_l2:
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
def scale_levels_lanes(x: Floats, top: int, fit: Floats, level: Floats) -> None:
    """The levels of the final fit, 0 to 2 * top - 1; 0 for groups of zeros."""
    for i in range(x.shape[0]):
        for g in range(LANES):
            inverse = fit[INVERSE, g]
            shifted = _level(inverse * x[i, g], np.float32(top)) + np.float32(top)
            level[i, g] = shifted if inverse != np.float32(0) else np.float32(0)


@kernel
def refine_scale_lanes(x: Floats, w: Floats, wx: Floats, top: int, level: Floats, fit: Floats) -> None:
    """Fit LANES groups as `refine_scale`; writes levels, 0 to 2 * top - 1, to `level` and weights to w and wx."""
    zero, top_value = np.float32(0), np.float32(top)
    absmax_lanes(x, fit)
    _weigh_squares(x, w, wx)
    _try(x, w, wx, top_value, top_value, fit)
    for g in range(LANES):
        fit[INVERSE, g] = fit[TRIED, g]
    _drop_zeros(fit)
    scale_levels_lanes(x, top, fit, level)
    for i in range(x.shape[0]):
        for g in range(LANES):
            level[i, g] -= top_value
    for _ in range(5):  # ggml stops when no level changes; a further pass would change none either
        _sweep(x, w, wx, top, level, fit)
    for g in range(LANES):
        sum_lx, sum_l2 = fit[SUM_LX, g], fit[SUM_L2, g]
        fit[SCALE, g] = sum_lx / sum_l2 if sum_l2 > zero and fit[INVERSE, g] != zero else zero
    for i in range(x.shape[0]):
        for g in range(LANES):
            level[i, g] = level[i, g] + top_value if fit[INVERSE, g] != zero else zero


@kernel
def _sweep(x: Floats, w: Floats, wx: Floats, top: int, level: Floats, fit: Floats) -> None:
    zero, never, lowest_level, highest_level = np.float32(0), np.float32(-1), np.int32(-top), np.int32(top - 1)
    for i in range(x.shape[0]):
        for g in range(LANES):
            old = level[i, g]
            sum_lx, sum_l2 = fit[SUM_LX, g], fit[SUM_L2, g]
            less_lx = sum_lx - wx[i, g] * old
            less_l2 = sum_l2 - w[i, g] * old * old
            q = nearest_int_numba(np.float32(x[i, g] * less_l2 / less_lx))
            q = q if q < highest_level else highest_level
            new = np.float32(q if q > lowest_level else lowest_level)
            new_lx = less_lx + wx[i, g] * new
            new_l2 = less_l2 + w[i, g] * new * new
            gain = new_lx * new_lx * sum_l2  # one condition at a time: numba does not vectorize a condition with "and"
            gain = gain if less_lx > zero else never
            gain = gain if new != old else never
            gain = gain if new_l2 > zero else never
            better = gain > sum_lx * sum_lx * new_l2
            level[i, g] = new if better else old
            fit[SUM_LX, g] = new_lx if better else sum_lx
            fit[SUM_L2, g] = new_l2 if better else sum_l2


@kernel
def absmax_lanes(x: Floats, fit: Floats) -> None:
    """Write the first element of the largest magnitude of each group, with its sign, to row ABSMAX."""
    for g in range(LANES):
        fit[ABSMAX, g] = np.float32(0)
    for i in range(x.shape[0]):
        for g in range(LANES):
            v = x[i, g]
            fit[ABSMAX, g] = v if abs(v) > abs(fit[ABSMAX, g]) else fit[ABSMAX, g]


@kernel
def _weigh_squares(x: Floats, w: Floats, wx: Floats) -> None:
    for i in range(x.shape[0]):
        for g in range(LANES):
            v = x[i, g]
            w[i, g] = v * v
            wx[i, g] = v * v * v


@kernel
def _try(x: Floats, w: Floats, wx: Floats, top: np.float32, level_of_absmax: np.float32, fit: Floats) -> None:
    for g in range(LANES):
        fit[TRIED, g] = -level_of_absmax / fit[ABSMAX, g]
        fit[SUM_LX, g] = fit[SUM_L2, g] = np.float32(0)
    for i in range(0, x.shape[0], 2):  # two at a time, because storing the sums is the bottleneck
        for g in range(LANES):
            a, b = _level(fit[TRIED, g] * x[i, g], top), _level(fit[TRIED, g] * x[i + 1, g], top)
            fit[SUM_LX, g] = fit[SUM_LX, g] + wx[i, g] * a + wx[i + 1, g] * b
            fit[SUM_L2, g] = fit[SUM_L2, g] + w[i, g] * a * a + w[i + 1, g] * b * b


@kernel
def _level(value: np.float32, top: np.float32) -> np.float32:
    level = np.float32(np.float32(value + np.float32(ROUNDING_MAGIC)) - np.float32(ROUNDING_MAGIC))
    level = level if level < top - np.float32(1) else top - np.float32(1)
    return level if level > -top else -top


@kernel
def _accept(fit: Floats) -> None:
    zero = np.float32(0)
    for g in range(LANES):
        sum_lx, sum_l2 = fit[SUM_LX, g], fit[SUM_L2, g]
        gain = sum_lx * sum_lx if sum_l2 > zero else np.float32(-1)
        better = gain > fit[BEST, g] * sum_l2
        scale = sum_lx / sum_l2
        fit[SCALE, g] = scale if better else fit[SCALE, g]
        fit[BEST, g] = scale * sum_lx if better else fit[BEST, g]
        fit[INVERSE, g] = fit[TRIED, g] if better else fit[INVERSE, g]


@kernel
def _drop_zeros(fit: Floats) -> None:
    zero = np.float32(0)
    for g in range(LANES):
        is_zero = abs(fit[ABSMAX, g]) < np.float32(GROUP_MAX_EPS)
        fit[SCALE, g] = zero if is_zero else fit[SCALE, g]
        fit[INVERSE, g] = zero if is_zero else fit[INVERSE, g]
