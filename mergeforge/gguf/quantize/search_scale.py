"""The scale of a group without a minimum: x ~ scale * level, level in [-top, top - 1], smallest weighted error.

The element of the largest magnitude gets level -top, or a value near it. `fit_scale` (ggml's make_qx_quants() with
rmse_type 1) tries 18 more values for it. `refine_scale` (ggml's make_q3_quants()) changes single levels instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    GROUP_MAX_EPS,
    const_divided_by,
    levels,
    ordered_sum,
    signed_absmax,
)

if TYPE_CHECKING:
    from torch import Tensor


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
