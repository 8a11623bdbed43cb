"""The scale and minimum of a group: x ~ scale * level + minimum, level in [0, top], with the smallest weighted error.

ggml's make_qkx2_quants() and, with `guarded`, make_qkx3_quants(). Each step divides the range by top + first +
step * delta to get levels, fits a line through them by least squares, and keeps the line if its error is the smallest
so far. The next step starts from the kept line's minimum, as in llama.cpp. Of the levels only the inverse scale and
the offset are kept, which determine them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    LANES,
    ROUNDING_MAGIC,
    const_divided_by,
    first_min,
    levels,
    nearest_int_numba,
    ordered_sum,
    positive_part,
)
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Floats


@dataclass(frozen=True)
class ScaleMinSearch:
    """Search parameters of a type: the highest level, and divisors top + first + step * delta for step <= steps."""

    top: int
    first: float
    delta: float
    steps: int
    absolute: bool = False  # minimize |difference| instead of its square (use_mad in ggml)
    guarded: bool = False


@dataclass(frozen=True, eq=False)
class ScaleMinFit:
    """The fit of each group: x ~ scale * level + minimum; level = nearest_int(inverse * (x - offset))."""

    scale: Tensor
    minimum: Tensor
    inverse: Tensor
    offset: Tensor


def importance_search(top: int) -> ScaleMinSearch:
    """The search parameters that every type with a minimum uses when there is an importance vector."""
    return ScaleMinSearch(top, -0.9, 0.05, 36, guarded=True)


def fit_scale_min(x: Tensor, weight: Tensor, search: ScaleMinSearch) -> ScaleMinFit:
    """Fit every group of x (n x N) with torch. ggml: make_qkx2_quants(), make_qkx3_quants()."""
    import torch

    lowest, high = first_min(x), x.amax(0) + 0.0  # never -0, whatever the order of the zeros
    low = torch.where(lowest > 0, torch.zeros_like(lowest), lowest)
    total = (ordered_sum(weight), ordered_sum(weight * x))
    inverse = const_divided_by(search.top, high - low)
    # If the range is so small that its inverse is infinite, C's levels are 0.
    fit = ScaleMinFit(
        const_divided_by(1, inverse), low, torch.where(inverse.isinf(), torch.zeros_like(inverse), inverse), low
    )
    best = _error(x, weight, fit.scale, low, levels_of_fit(x, fit, search), search)
    first, delta = torch.tensor(search.first), torch.tensor(search.delta)  # float32, as in C
    for step in range(search.steps + 1):
        divisor = float(first + delta * step + search.top)
        inverse = const_divided_by(divisor, high - fit.minimum)
        level = _levels(x, inverse, fit.minimum, search)
        scale, low, valid = _least_squares(x, weight, level, *total)
        error = _error(x, weight, scale, low, level, search)
        better = valid & (error < best)
        best = torch.where(better, error, best)
        fit = _choose(fit, better, ScaleMinFit(scale, low, inverse, fit.minimum))
    return fit


def levels_of_fit(x: Tensor, fit: ScaleMinFit, search: ScaleMinSearch) -> Tensor:
    """The levels of the final fit, as float32."""
    return _levels(x, fit.inverse, fit.offset, search)


def _levels(x: Tensor, inverse: Tensor, offset: Tensor, search: ScaleMinSearch) -> Tensor:
    value = (x - offset).mul_(inverse)
    if search.guarded:  # the range may be empty, which gives infinity or NaN
        value = positive_part(value).clamp_(max=search.top)
    return levels(value, 0, search.top)


def _least_squares(x: Tensor, weight: Tensor, level: Tensor, sum_w: Tensor, sum_x: Tensor) -> tuple[Tensor, ...]:
    import torch

    product = weight * level
    sum_l, sum_xl = ordered_sum(product), ordered_sum(product * x)
    sum_l2 = ordered_sum(product.mul_(level))
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    above = low > 0
    scale = torch.where(above, sum_xl / sum_l2, scale)
    return scale, torch.where(above, torch.zeros_like(low), low), determinant > 0


def _error(x: Tensor, weight: Tensor, scale: Tensor, low: Tensor, level: Tensor, search: ScaleMinSearch) -> Tensor:
    difference = (scale * level).add_(low).sub_(x)
    difference = difference.abs_() if search.absolute else difference.mul_(difference)
    return ordered_sum(difference.mul_(weight))


def _choose(fit: ScaleMinFit, better: Tensor, new: ScaleMinFit) -> ScaleMinFit:
    import torch

    return ScaleMinFit(
        torch.where(better, new.scale, fit.scale),
        torch.where(better, new.minimum, fit.minimum),
        torch.where(better, new.inverse, fit.inverse),
        torch.where(better, new.offset, fit.offset),
    )


# The rows of a kernel's `fit` (SCALE_MIN_ROWS x LANES); the first four are the result.
SCALE, MINIMUM, INVERSE, OFFSET, HIGH, SUM_W, SUM_X, BEST, SUM_L, SUM_L2, SUM_XL, TRIED = range(12)
NEW_SCALE, NEW_MINIMUM, ERROR = 12, 13, 14
SCALE_MIN_ROWS = 15


@kernel
def fit_scale_min_lanes(
    x: Floats,
    w: Floats,
    top: int,
    first: float,
    delta: float,
    steps: int,
    absolute: bool,
    guarded: bool,
    level: Floats,
    fit: Floats,
) -> None:
    """Fit LANES groups as `fit_scale_min`; x and w are n x LANES, `level` is a buffer of the same size."""
    _start(x, w, np.float32(top), absolute, level, fit)
    for step in range(steps + 1):
        divisor = np.float32(np.float32(first) + np.float32(delta) * np.float32(step)) + np.float32(top)
        if guarded:
            _fit_guarded(x, w, np.float32(top), divisor, level, fit)
        else:
            _fit(x, w, top, divisor, level, fit)
        _solve(fit)
        _measure(x, w, absolute, level, fit, NEW_SCALE, NEW_MINIMUM)
        _accept(fit)


@kernel
def scale_min_levels_lanes(x: Floats, top: int, guarded: bool, fit: Floats, level: Floats) -> None:
    """The levels of the final fit."""
    for i in range(x.shape[0]):
        for g in range(LANES):
            value = fit[INVERSE, g] * (x[i, g] - fit[OFFSET, g])
            level[i, g] = _guarded_level(value, np.float32(top)) if guarded else _level(value, np.int32(top))


@kernel
def _start(x: Floats, w: Floats, top: np.float32, absolute: bool, level: Floats, fit: Floats) -> None:
    zero = np.float32(0)
    for g in range(LANES):
        fit[MINIMUM, g] = fit[HIGH, g] = x[0, g]
        fit[SUM_W, g] = w[0, g]
        fit[SUM_X, g] = w[0, g] * x[0, g]
    for i in range(1, x.shape[0]):
        for g in range(LANES):
            v = x[i, g]
            fit[MINIMUM, g] = v if v < fit[MINIMUM, g] else fit[MINIMUM, g]
            fit[HIGH, g] = v if v > fit[HIGH, g] else fit[HIGH, g]
            fit[SUM_W, g] += w[i, g]
            fit[SUM_X, g] += w[i, g] * v
    for g in range(LANES):
        low = fit[MINIMUM, g]
        low = zero if low > zero else low
        inverse = top / (fit[HIGH, g] - low)
        fit[MINIMUM, g] = fit[OFFSET, g] = low
        fit[SCALE, g] = np.float32(1) / inverse
        fit[INVERSE, g] = inverse if inverse < np.float32(np.inf) else zero  # infinite: C's levels are 0
        fit[ERROR, g] = zero
    scale_min_levels_lanes(x, int(top), False, fit, level)
    _measure(x, w, absolute, level, fit, SCALE, MINIMUM)
    for g in range(LANES):
        fit[BEST, g] = fit[ERROR, g]


# The two loops below take two elements at a time, because storing the sums is the bottleneck.


@kernel
def _fit(x: Floats, w: Floats, top: int, divisor: np.float32, level: Floats, fit: Floats) -> None:
    top_level = np.int32(top)
    _divide(divisor, fit)
    for i in range(0, x.shape[0], 2):
        for g in range(LANES):
            low, inverse = fit[MINIMUM, g], fit[TRIED, g]
            a, b = x[i, g], x[i + 1, g]
            level_a, level_b = _level(inverse * (a - low), top_level), _level(inverse * (b - low), top_level)
            level[i, g], level[i + 1, g] = level_a, level_b
            product_a, product_b = w[i, g] * level_a, w[i + 1, g] * level_b
            fit[SUM_L, g] = fit[SUM_L, g] + product_a + product_b
            fit[SUM_L2, g] = fit[SUM_L2, g] + product_a * level_a + product_b * level_b
            fit[SUM_XL, g] = fit[SUM_XL, g] + product_a * a + product_b * b


@kernel
def _fit_guarded(x: Floats, w: Floats, top: np.float32, divisor: np.float32, level: Floats, fit: Floats) -> None:
    _divide(divisor, fit)
    for i in range(0, x.shape[0], 2):
        for g in range(LANES):
            low, inverse = fit[MINIMUM, g], fit[TRIED, g]
            a, b = x[i, g], x[i + 1, g]
            level_a, level_b = _guarded_level(inverse * (a - low), top), _guarded_level(inverse * (b - low), top)
            level[i, g], level[i + 1, g] = level_a, level_b
            product_a, product_b = w[i, g] * level_a, w[i + 1, g] * level_b
            fit[SUM_L, g] = fit[SUM_L, g] + product_a + product_b
            fit[SUM_L2, g] = fit[SUM_L2, g] + product_a * level_a + product_b * level_b
            fit[SUM_XL, g] = fit[SUM_XL, g] + product_a * a + product_b * b


@kernel
def _level(value: np.float32, top_level: np.int32) -> np.float32:
    level = nearest_int_numba(value)
    level = level if level < top_level else top_level
    return np.float32(level if level > np.int32(0) else np.int32(0))


@kernel
def _guarded_level(value: np.float32, top_level: np.float32) -> np.float32:
    value = value if value > np.float32(0) else np.float32(0)  # NaN too
    value = value if value < top_level else top_level
    return np.float32(np.float32(value + np.float32(ROUNDING_MAGIC)) - np.float32(ROUNDING_MAGIC))


@kernel
def _divide(divisor: np.float32, fit: Floats) -> None:
    for g in range(LANES):
        fit[TRIED, g] = divisor / (fit[HIGH, g] - fit[MINIMUM, g])
        fit[SUM_L, g] = fit[SUM_L2, g] = fit[SUM_XL, g] = np.float32(0)


@kernel
def _solve(fit: Floats) -> None:
    zero, never = np.float32(0), np.float32(np.inf)
    for g in range(LANES):
        sum_l, sum_l2, sum_xl = fit[SUM_L, g], fit[SUM_L2, g], fit[SUM_XL, g]
        sum_w, sum_x = fit[SUM_W, g], fit[SUM_X, g]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        through_zero = sum_xl / sum_l2
        fit[NEW_SCALE, g] = through_zero if low > zero else scale
        fit[NEW_MINIMUM, g] = zero if low > zero else low
        fit[ERROR, g] = zero if determinant > zero else never


@kernel
def _measure(x: Floats, w: Floats, absolute: bool, level: Floats, fit: Floats, scale: int, low: int) -> None:
    if absolute:
        for i in range(x.shape[0]):
            for g in range(LANES):
                fit[ERROR, g] += w[i, g] * abs(fit[scale, g] * level[i, g] + fit[low, g] - x[i, g])
        return
    for i in range(x.shape[0]):
        for g in range(LANES):
            difference = fit[scale, g] * level[i, g] + fit[low, g] - x[i, g]
            fit[ERROR, g] += w[i, g] * (difference * difference)


@kernel
def _accept(fit: Floats) -> None:
    for g in range(LANES):
        better = fit[ERROR, g] < fit[BEST, g]
        fit[BEST, g] = fit[ERROR, g] if better else fit[BEST, g]
        fit[INVERSE, g] = fit[TRIED, g] if better else fit[INVERSE, g]
        fit[OFFSET, g] = fit[MINIMUM, g] if better else fit[OFFSET, g]
        fit[SCALE, g] = fit[NEW_SCALE, g] if better else fit[SCALE, g]
        fit[MINIMUM, g] = fit[NEW_MINIMUM, g] if better else fit[MINIMUM, g]
