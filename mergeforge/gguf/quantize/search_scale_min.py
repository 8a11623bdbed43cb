"""A group's scale and minimum: x ~ scale * l + low with whole l in [0, top], the least weighted error.

ggml's make_qkx2_quants() and, with `guarded`, make_qkx3_quants(): the range is divided by top + first +
step * delta for a few steps; for each, the best line through the levels is found by least squares, and
the line with the least error of all stays. (The next step starts from its minimum: llama.cpp does so.)
The levels themselves are not kept: inverse scale and offset say what they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import (
    LANES,
    MAGIC,
    first_lowest,
    levels,
    nearest_level,
    ordered_sum,
    positive,
    quotient,
)
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Floats


@dataclass(frozen=True)
class Search:
    """How a type searches: the largest level, divisors top + first + step * delta, step <= steps."""

    top: int
    first: float
    delta: float
    steps: int
    absolute: bool = False  # the error is |difference|, not its square
    guarded: bool = False


@dataclass(frozen=True, eq=False)
class Line:
    """What was found for each group: x ~ scale * level + low; level = nearest(inverse * (x - offset))."""

    scale: Tensor
    low: Tensor
    inverse: Tensor
    offset: Tensor


def weighted(top: int) -> Search:
    """The search of every such type when it has an importance vector."""
    return Search(top, -0.9, 0.05, 36, guarded=True)


def search(x: Tensor, weight: Tensor, how: Search) -> Line:
    """Fit every group of x (n x N), in torch."""
    import torch

    lowest, high = first_lowest(x), x.amax(0) + 0.0  # not -0, whatever the order of zeros
    low = torch.where(lowest > 0, torch.zeros_like(lowest), lowest)
    total = (ordered_sum(weight), ordered_sum(weight * x))
    inverse = quotient(how.top, high - low)
    # A range so small that its inverse is infinite: C's levels are then 0.
    line = Line(quotient(1, inverse), low, torch.where(inverse.isinf(), torch.zeros_like(inverse), inverse), low)
    best = _error(x, weight, line.scale, low, levels_of(x, line, how), how)
    first, delta = torch.tensor(how.first), torch.tensor(how.delta)  # float32, as in C
    for step in range(how.steps + 1):
        divisor = float(first + delta * step + how.top)
        inverse = quotient(divisor, high - line.low)
        level = _levels(x, inverse, line.low, how)
        scale, low, valid = _least_squares(x, weight, level, *total)
        error = _error(x, weight, scale, low, level, how)
        better = valid & (error < best)
        best = torch.where(better, error, best)
        line = _replaced(line, better, Line(scale, low, inverse, line.low))
    return line


def levels_of(x: Tensor, line: Line, how: Search) -> Tensor:
    """The levels that the search ended with, as float32."""
    return _levels(x, line.inverse, line.offset, how)


def _levels(x: Tensor, inverse: Tensor, offset: Tensor, how: Search) -> Tensor:
    value = (x - offset).mul_(inverse)
    if how.guarded:  # the range may be empty: infinite or no number
        value = positive(value).clamp_(max=how.top)
    return levels(value, 0, how.top)


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


def _error(x: Tensor, weight: Tensor, scale: Tensor, low: Tensor, level: Tensor, how: Search) -> Tensor:
    difference = (scale * level).add_(low).sub_(x)
    difference = difference.abs_() if how.absolute else difference.mul_(difference)
    return ordered_sum(difference.mul_(weight))


def _replaced(line: Line, better: Tensor, found: Line) -> Line:
    import torch

    return Line(
        torch.where(better, found.scale, line.scale),
        torch.where(better, found.low, line.low),
        torch.where(better, found.inverse, line.inverse),
        torch.where(better, found.offset, line.offset),
    )


# The rows of a kernel's `found` (ROWS x LANES): the first four are the result.
SCALE, LOW, INVERSE, OFFSET, HIGH, SUM_W, SUM_X, BEST, SUM_L, SUM_L2, SUM_XL, TRIED, NEW_SCALE, NEW_LOW, ERROR = range(
    15
)
ROWS = 15


@kernel
def search_lanes(
    x: Floats,
    w: Floats,
    top: int,
    first: float,
    delta: float,
    steps: int,
    absolute: bool,
    guarded: bool,
    level: Floats,
    found: Floats,
) -> None:
    """Fit LANES groups, x and w n x LANES; `level` is a buffer of that size."""
    _start(x, w, np.float32(top), absolute, level, found)
    for step in range(steps + 1):
        divisor = np.float32(np.float32(first) + np.float32(delta) * np.float32(step)) + np.float32(top)
        if guarded:
            _fit_guarded(x, w, np.float32(top), divisor, level, found)
        else:
            _fit(x, w, top, divisor, level, found)
        _solve(found)
        _measure(x, w, absolute, level, found, NEW_SCALE, NEW_LOW)
        _accept(found)


@kernel
def levels_lanes(x: Floats, top: int, guarded: bool, found: Floats, level: Floats) -> None:
    """The levels that the search ended with."""
    for i in range(x.shape[0]):
        for g in range(LANES):
            value = found[INVERSE, g] * (x[i, g] - found[OFFSET, g])
            level[i, g] = _guarded_level(value, np.float32(top)) if guarded else _level(value, np.int32(top))


@kernel
def _start(x: Floats, w: Floats, top: np.float32, absolute: bool, level: Floats, s: Floats) -> None:
    zero = np.float32(0)
    for g in range(LANES):
        s[LOW, g] = s[HIGH, g] = x[0, g]
        s[SUM_W, g] = w[0, g]
        s[SUM_X, g] = w[0, g] * x[0, g]
    for i in range(1, x.shape[0]):
        for g in range(LANES):
            v = x[i, g]
            s[LOW, g] = v if v < s[LOW, g] else s[LOW, g]
            s[HIGH, g] = v if v > s[HIGH, g] else s[HIGH, g]
            s[SUM_W, g] += w[i, g]
            s[SUM_X, g] += w[i, g] * v
    for g in range(LANES):
        low = s[LOW, g]
        low = zero if low > zero else low
        inverse = top / (s[HIGH, g] - low)
        s[LOW, g] = s[OFFSET, g] = low
        s[SCALE, g] = np.float32(1) / inverse
        s[INVERSE, g] = inverse if inverse < np.float32(np.inf) else zero  # infinite: C's levels are then 0
        s[ERROR, g] = zero
    levels_lanes(x, int(top), False, s, level)
    _measure(x, w, absolute, level, s, SCALE, LOW)
    for g in range(LANES):
        s[BEST, g] = s[ERROR, g]


# Two elements at a time below, so that sums are stored half as often: stores are what limits.


@kernel
def _fit(x: Floats, w: Floats, top: int, divisor: np.float32, level: Floats, s: Floats) -> None:
    most = np.int32(top)
    _divide(divisor, s)
    for i in range(0, x.shape[0], 2):
        for g in range(LANES):
            low, inverse = s[LOW, g], s[TRIED, g]
            a, b = x[i, g], x[i + 1, g]
            level_a, level_b = _level(inverse * (a - low), most), _level(inverse * (b - low), most)
            level[i, g], level[i + 1, g] = level_a, level_b
            product_a, product_b = w[i, g] * level_a, w[i + 1, g] * level_b
            s[SUM_L, g] = s[SUM_L, g] + product_a + product_b
            s[SUM_L2, g] = s[SUM_L2, g] + product_a * level_a + product_b * level_b
            s[SUM_XL, g] = s[SUM_XL, g] + product_a * a + product_b * b


@kernel
def _fit_guarded(x: Floats, w: Floats, top: np.float32, divisor: np.float32, level: Floats, s: Floats) -> None:
    _divide(divisor, s)
    for i in range(0, x.shape[0], 2):
        for g in range(LANES):
            low, inverse = s[LOW, g], s[TRIED, g]
            a, b = x[i, g], x[i + 1, g]
            level_a, level_b = _guarded_level(inverse * (a - low), top), _guarded_level(inverse * (b - low), top)
            level[i, g], level[i + 1, g] = level_a, level_b
            product_a, product_b = w[i, g] * level_a, w[i + 1, g] * level_b
            s[SUM_L, g] = s[SUM_L, g] + product_a + product_b
            s[SUM_L2, g] = s[SUM_L2, g] + product_a * level_a + product_b * level_b
            s[SUM_XL, g] = s[SUM_XL, g] + product_a * a + product_b * b


@kernel
def _level(value: np.float32, most: np.int32) -> np.float32:
    level = nearest_level(value)
    level = level if level < most else most
    return np.float32(level if level > np.int32(0) else np.int32(0))


@kernel
def _guarded_level(value: np.float32, most: np.float32) -> np.float32:
    value = value if value > np.float32(0) else np.float32(0)  # no number, too
    value = value if value < most else most
    return np.float32(np.float32(value + np.float32(MAGIC)) - np.float32(MAGIC))


@kernel
def _divide(divisor: np.float32, s: Floats) -> None:
    for g in range(LANES):
        s[TRIED, g] = divisor / (s[HIGH, g] - s[LOW, g])
        s[SUM_L, g] = s[SUM_L2, g] = s[SUM_XL, g] = np.float32(0)


@kernel
def _solve(s: Floats) -> None:
    zero, never = np.float32(0), np.float32(np.inf)
    for g in range(LANES):
        sum_l, sum_l2, sum_xl = s[SUM_L, g], s[SUM_L2, g], s[SUM_XL, g]
        sum_w, sum_x = s[SUM_W, g], s[SUM_X, g]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        through_zero = sum_xl / sum_l2
        s[NEW_SCALE, g] = through_zero if low > zero else scale
        s[NEW_LOW, g] = zero if low > zero else low
        s[ERROR, g] = zero if determinant > zero else never


@kernel
def _measure(x: Floats, w: Floats, absolute: bool, level: Floats, s: Floats, scale: int, low: int) -> None:
    if absolute:
        for i in range(x.shape[0]):
            for g in range(LANES):
                s[ERROR, g] += w[i, g] * abs(s[scale, g] * level[i, g] + s[low, g] - x[i, g])
        return
    for i in range(x.shape[0]):
        for g in range(LANES):
            difference = s[scale, g] * level[i, g] + s[low, g] - x[i, g]
            s[ERROR, g] += w[i, g] * (difference * difference)


@kernel
def _accept(s: Floats) -> None:
    for g in range(LANES):
        better = s[ERROR, g] < s[BEST, g]
        s[BEST, g] = s[ERROR, g] if better else s[BEST, g]
        s[INVERSE, g] = s[TRIED, g] if better else s[INVERSE, g]
        s[OFFSET, g] = s[LOW, g] if better else s[OFFSET, g]
        s[SCALE, g] = s[NEW_SCALE, g] if better else s[SCALE, g]
        s[LOW, g] = s[NEW_LOW, g] if better else s[LOW, g]
