"""Integer levels for the scales of a block's groups: ggml's make_qp_quants(), used with an importance vector.

The scales are not negative. Nine inverse steps near top / largest are compared, then single levels are changed, in at
most five passes, as long as that lowers the weighted error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    GROUP_MAX_EPS,
    const_divided_by,
    nearest_int,
    ordered_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


def fit_block_scales(x: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Step and levels (int32) of each column of x (n x N), with torch. ggml: make_qp_quants()."""
    import torch

    largest = x.amax(0)
    is_zero = largest < GROUP_MAX_EPS
    inverse = const_divided_by(top, largest)
    first = nearest_int(inverse * x) & 0xFF
    best = _error(x, weight, const_divided_by(1, inverse), first)
    for offset in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = const_divided_by(float(torch.tensor(0.1) * offset + top), largest)
        error = _error(x, weight, const_divided_by(1, tried), nearest_int(tried * x).clamp_(max=top))
        better = error < best
        best, inverse = torch.where(better, error, best), torch.where(better, tried, inverse)
    level = nearest_int(inverse * x).clamp_(max=top)
    sum_lx = ordered_sum(weight * x * level)
    sum_l2 = ordered_sum(weight * level * level)
    level &= 0xFF
    for _ in range(5):
        before = level.clone()
        for i in range(len(x)):
            sum_lx, sum_l2 = _move(x[i], weight[i], level[i], top, sum_lx, sum_l2)
        if torch.equal(before, level):
            break
    step = torch.where((sum_l2 > 0) & ~is_zero, sum_lx / sum_l2, torch.zeros_like(largest))
    return step, torch.where(is_zero, torch.zeros_like(level), level)


def _error(x: Tensor, weight: Tensor, step: Tensor, level: Tensor) -> Tensor:
    difference = x - step * level
    return ordered_sum(weight * difference * difference)


def _move(x: Tensor, w: Tensor, level: Tensor, top: int, sum_lx: Tensor, sum_l2: Tensor) -> tuple[Tensor, Tensor]:
    """Change one element's level in place where that is better; returns the new sums."""
    import torch

    less_lx, less_l2 = sum_lx - w * x * level, sum_l2 - w * level * level
    new_level = nearest_int(x * less_l2 / less_lx).clamp_(max=top)
    new_lx, new_l2 = less_lx + w * x * new_level, less_l2 + w * new_level * new_level
    better = (less_lx > 0) & (less_l2 > 0) & (new_level != level)
    better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
    level.copy_(torch.where(better, new_level & 0xFF, level))
    return torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
