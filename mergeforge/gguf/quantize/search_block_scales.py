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
    nearest_int_numba,
    ordered_sum,
)
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Floats


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


@kernel
def fit_block_scales_numba(x: Floats, w: Floats, top: int, level: Floats) -> np.float32:
    """The step of one block's scales as `fit_block_scales`; writes their levels to `level`."""
    zero, top_value = np.float32(0), np.float32(top)
    largest = zero
    for i in range(x.size):
        largest = x[i] if x[i] > largest else largest
    if largest < np.float32(GROUP_MAX_EPS):
        level[:] = zero
        return zero
    inverse = top_value / largest
    for i in range(x.size):
        level[i] = np.float32(nearest_int_numba(inverse * x[i]) & 0xFF)
    best = _error_of(x, w, np.float32(1) / inverse, level)
    for offset in range(-4, 5):
        if offset != 0:
            tried = np.float32(np.float32(0.1) * np.float32(offset) + top_value) / largest
            _store_levels(x, tried, top, level)
            error = _error_of(x, w, np.float32(1) / tried, level)
            if error < best:
                best, inverse = error, tried
    _store_levels(x, inverse, top, level)
    return _move_levels(x, w, top, level)


@kernel
def _store_levels(x: Floats, inverse: np.float32, top: int, level: Floats) -> None:
    for i in range(x.size):
        level[i] = np.float32(min(nearest_int_numba(inverse * x[i]), np.int32(top)))


@kernel
def _error_of(x: Floats, w: Floats, step: np.float32, level: Floats) -> np.float32:
    total = np.float32(0)
    for i in range(x.size):
        difference = x[i] - step * level[i]
        total += w[i] * difference * difference
    return total


@kernel
def _move_levels(x: Floats, w: Floats, top: int, level: Floats) -> np.float32:
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
                new_level = np.float32(min(nearest_int_numba(np.float32(x[i] * less_l2 / less_lx)), np.int32(top)))
                if new_level != level[i]:
                    new_lx = less_lx + w[i] * x[i] * new_level
                    new_l2 = less_l2 + w[i] * new_level * new_level
                    if new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2:
                        level[i] = np.float32(np.int64(new_level) & 0xFF)
                        sum_lx, sum_l2 = new_lx, new_l2
                        changed = True
        if not changed:
            break
    return sum_lx / sum_l2 if sum_l2 > zero else zero
