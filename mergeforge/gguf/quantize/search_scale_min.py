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
    const_divided_by,
    first_min,
    levels,
    ordered_sum,
    positive_part,
)

if TYPE_CHECKING:
    from torch import Tensor


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
