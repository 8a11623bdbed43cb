"""What the types of 256-column blocks share: groups and their weights, levels for rounded scales, packed bits.

Torch works on x as size x groups (see rounding), on blocks as N x 256. A kernel takes as many blocks at a time
as make LANES groups, so its buffers are a few tens of KiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import LANES, grouped, levels, nearest_level, ordered_sum, root
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Bytes, Floats

BLOCK = 256

# The rows of a kernel's `work`, WORK_ROWS x BLOCK, made once a call because an allocation takes as long as 16 elements.
STEP, SHIFTS, STEP_LEVEL, SHIFT_LEVEL, DIVISOR, SHIFT = range(6)
WORK_ROWS = 6


# torch


def importance_weights(rows: Tensor, importance: Tensor, size: int, factor: float, block: int = BLOCK) -> Tensor:
    """importance * sqrt(sigma2 + x * x), size x groups; sigma2 is factor * the block's mean square."""
    sigma2 = ordered_sum(grouped(rows * rows, block)).mul_(factor / block)  # a power of two: exact
    x = grouped(rows, size)
    sigma2 = sigma2.repeat_interleave(block // size)
    return root(sigma2 + x * x).mul_(importance_groups(rows, importance, size))


def importance_groups(rows: Tensor, importance: Tensor, size: int) -> Tensor:
    """The importance of every element, size x groups."""
    return grouped(importance.expand_as(rows), size)


def by_block(groups: Tensor, size: int) -> Tensor:
    """A value of each group (of `size` columns) as blocks x groups of a block."""
    return groups.reshape(-1, BLOCK // size)


def requantized(x: Tensor, step: Tensor, low: Tensor | None, least: int, most: int, kept: Tensor) -> Tensor:
    """Levels for rounded scales, N x 256 uint8 from 0 on; where the step is 0, the search's are kept.

    x and kept are size x groups; step and low have a value for each group.
    """
    import torch

    value = (x if low is None else x + low) / step
    level = levels(value, least, most).sub_(least)
    level = torch.where(step == 0, kept, level)
    return level.to(torch.uint8).t().reshape(-1, BLOCK)


def nibbles(level: Tensor, run: int) -> Tensor:
    """Two levels a byte: of 2 * run levels (the last dimension), l and l + run share byte l."""
    pairs = level.reshape(len(level), -1, 2, run)
    return (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(len(level), -1)


def quarters(level: Tensor) -> Tensor:
    """Four levels of two bits a byte: of 128 levels l, l + 32, l + 64 and l + 96 share byte l."""
    four = (level & 3).reshape(len(level), -1, 4, 32)
    return (four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6).reshape(len(level), -1)


def bit_planes(bit: Tensor) -> Tensor:
    """One bit of every level: byte l has in bit k that of level 32 * k + l."""
    planes = bit.reshape(len(bit), 8, 32)
    packed = planes[:, 0].clone()
    for k in range(1, 8):
        packed |= planes[:, k] << k
    return packed


# kernels


@kernel
def take_groups(x: Floats, size: int, x_t: Floats) -> None:
    """Turn groups of `size` elements into size x LANES; lanes beyond the input are zero."""
    groups = x.size // size
    for lane in range(LANES):
        if lane < groups:
            for i in range(size):
                x_t[i, lane] = x[lane * size + i]
        else:
            for i in range(size):
                x_t[i, lane] = np.float32(0)


@kernel
def take_importance(importance: Floats, start: int, size: int, w_t: Floats) -> None:
    """The importance of LANES groups that begin at flat position `start` of the rows, size x LANES."""
    columns = importance.size
    for lane in range(LANES):
        at = (start + lane * size) % columns
        for i in range(size):
            w_t[i, lane] = importance[at + i]


@kernel
def weigh(x: Floats, x_t: Floats, factor: float, block: int, w_t: Floats) -> None:
    """Importance (w_t) becomes importance * sqrt(sigma2 + x * x); sigma2 is factor * the block's mean square."""
    size = x_t.shape[0]
    sigma2 = np.zeros(LANES, np.float32)
    for b in range(x.size // block):
        mean = sum_of_squares(x[b * block : (b + 1) * block]) * np.float32(factor / block)
        for lane in range(b * block // size, (b + 1) * block // size):
            sigma2[lane] = mean
    for i in range(size):
        for g in range(LANES):
            w_t[i, g] *= np.sqrt(sigma2[g] + x_t[i, g] * x_t[i, g])


@kernel
def sum_of_squares(x: Floats) -> np.float32:
    """The sum of x * x, in order."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@kernel
def sum_weights(w_t: Floats, total: Floats) -> None:
    """The sum of each group's weights, in order."""
    total[:] = np.float32(0)
    for i in range(w_t.shape[0]):
        for g in range(LANES):
            total[g] += w_t[i, g]


@kernel
def requantize(x: Floats, step: Floats, low: Floats, least: int, most: int, work: Floats, level: Bytes) -> bool:
    """Levels of one block for rounded scales, from 0 on; whether all steps were other than 0.

    Steps and minima are spread to all elements first, in `work`: one long loop is faster than many short ones.
    """
    bottom, top = np.int32(least), np.int32(most)
    size = x.size // step.size
    complete = True
    for g in range(step.size):
        complete = complete and step[g] != np.float32(0)
        for i in range(g * size, (g + 1) * size):
            work[DIVISOR, i], work[SHIFT, i] = step[g], low[g]
    for i in range(BLOCK):
        q = nearest_level((x[i] + work[SHIFT, i]) / work[DIVISOR, i])
        q = q if q < top else top
        level[i] = np.uint8(np.int32((q if q > bottom else bottom) - bottom))
    return complete


@kernel
def keep_levels(step: Floats, level_t: Floats, first: int, level: Bytes) -> None:
    """The search's levels of one block, whose first group is lane `first`, where the step is 0."""
    size = level_t.shape[0]
    for g in range(step.size):
        if step[g] == np.float32(0):
            for i in range(size):
                level[g * size + i] = np.uint8(level_t[i, first + g])


@kernel
def put_quarters(level: Bytes, out: Bytes) -> None:
    """Four levels of two bits a byte, as `quarters`."""
    for half in range(2):
        for j in range(32):
            a = level[128 * half + j] & 3
            b = level[128 * half + 32 + j] & 3
            c = level[128 * half + 64 + j] & 3
            d = level[128 * half + 96 + j] & 3
            out[32 * half + j] = a | b << 2 | c << 4 | d << 6
