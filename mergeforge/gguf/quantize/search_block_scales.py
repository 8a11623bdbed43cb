"""A block's scales in whole numbers: ggml's make_qp_quants(), used when there is an importance vector.

The scales of a block's groups are not negative. Nine inverses near top / largest are compared, then single
levels are moved, at most five times through the block, while that lowers the weighted error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import EPSILON, nearest, nearest_level, ordered_sum, quotient
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Floats


def search(x: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Step and levels (int32) of each column of x (n x N), in torch."""
    import torch

    largest = x.amax(0)
    zero = largest < EPSILON
    inverse = quotient(top, largest)
    first = nearest(inverse * x) & 0xFF
    best = _error(x, weight, quotient(1, inverse), first)
    for place in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = quotient(float(torch.tensor(0.1) * place + top), largest)
        error = _error(x, weight, quotient(1, tried), nearest(tried * x).clamp_(max=top))
        better = error < best
        best, inverse = torch.where(better, error, best), torch.where(better, tried, inverse)
    level = nearest(inverse * x).clamp_(max=top)
    sum_lx = ordered_sum(weight * x * level)
    sum_l2 = ordered_sum(weight * level * level)
    level &= 0xFF
    for _ in range(5):
        before = level.clone()
        for i in range(len(x)):
            sum_lx, sum_l2 = _move(x[i], weight[i], level[i], top, sum_lx, sum_l2)
        if torch.equal(before, level):
            break
    step = torch.where((sum_l2 > 0) & ~zero, sum_lx / sum_l2, torch.zeros_like(largest))
    return step, torch.where(zero, torch.zeros_like(level), level)


def _error(x: Tensor, weight: Tensor, step: Tensor, level: Tensor) -> Tensor:
    difference = x - step * level
    return ordered_sum(weight * difference * difference)


def _move(x: Tensor, w: Tensor, level: Tensor, top: int, sum_lx: Tensor, sum_l2: Tensor) -> tuple[Tensor, Tensor]:
    """Move one element's level (in place) where that is better; the sums then."""
    import torch

    less_lx, less_l2 = sum_lx - w * x * level, sum_l2 - w * level * level
    moved = nearest(x * less_l2 / less_lx).clamp_(max=top)
    new_lx, new_l2 = less_lx + w * x * moved, less_l2 + w * moved * moved
    better = (less_lx > 0) & (less_l2 > 0) & (moved != level)
    better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
    level.copy_(torch.where(better, moved & 0xFF, level))
    return torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)


@kernel
def fit_scales(x: Floats, w: Floats, top: int, level: Floats) -> np.float32:
    """The step of one block's scales; `level` gets their levels."""
    zero, most = np.float32(0), np.float32(top)
    largest = zero
    for i in range(x.size):
        largest = x[i] if x[i] > largest else largest
    if largest < np.float32(EPSILON):
        level[:] = zero
        return zero
    inverse = most / largest
    for i in range(x.size):
        level[i] = np.float32(nearest_level(inverse * x[i]) & 0xFF)
    best = _error_of(x, w, np.float32(1) / inverse, level)
    for place in range(-4, 5):
        if place != 0:
            tried = np.float32(np.float32(0.1) * np.float32(place) + most) / largest
            _put_levels(x, tried, top, level)
            error = _error_of(x, w, np.float32(1) / tried, level)
            if error < best:
                best, inverse = error, tried
    _put_levels(x, inverse, top, level)
    return _moved(x, w, top, level)


@kernel
def _put_levels(x: Floats, inverse: np.float32, top: int, level: Floats) -> None:
    for i in range(x.size):
        level[i] = np.float32(min(nearest_level(inverse * x[i]), np.int32(top)))


@kernel
def _error_of(x: Floats, w: Floats, step: np.float32, level: Floats) -> np.float32:
    total = np.float32(0)
    for i in range(x.size):
        difference = x[i] - step * level[i]
        total += w[i] * difference * difference
    return total


@kernel
def _moved(x: Floats, w: Floats, top: int, level: Floats) -> np.float32:
    zero = np.float32(0)
    sum_lx = sum_l2 = zero
    for i in range(x.size):
        sum_lx += w[i] * x[i] * level[i]
        sum_l2 += w[i] * level[i] * level[i]
        level[i] = np.float32(np.int64(level[i]) & 0xFF)
    for _ in range(5):
        changed = False
        for i in range(x.size):
            less_lx = sum_lx - w[i] * x[i] * level[i]
            less_l2 = sum_l2 - w[i] * level[i] * level[i]
            if less_lx > zero and less_l2 > zero:
                new = np.float32(min(nearest_level(np.float32(x[i] * less_l2 / less_lx)), np.int32(top)))
                if new != level[i]:
                    new_lx = less_lx + w[i] * x[i] * new
                    new_l2 = less_l2 + w[i] * new * new
                    if new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2:
                        level[i] = np.float32(np.int64(new) & 0xFF)
                        sum_lx, sum_l2 = new_lx, new_l2
                        changed = True
        if not changed:
            break
    return sum_lx / sum_l2 if sum_l2 > zero else zero
