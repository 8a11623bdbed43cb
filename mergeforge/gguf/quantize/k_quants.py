"""Shared by the K-quants, partly by the 32-column types: importance weights, levels for rounded scales, bit packing.

The torch functions take x as size x groups (see ggml_math) and levels of blocks as N x 256. A kernel takes as many
blocks at a time as fill LANES groups, so its buffers need a few tens of KiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import LANES, exact_sqrt, levels, nearest_int_numba, ordered_sum, to_groups
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Bytes, Floats

BLOCK = 256  # ggml's QK_K

# The rows of a kernel's `work`, WORK_ROWS x BLOCK: allocated once per call, because an allocation takes as long as
# 16 elements.
STEP, MIN, STEP_LEVEL, MIN_LEVEL, ELEMENT_STEP, ELEMENT_MIN = range(6)
WORK_ROWS = 6


# torch


def importance_weights(rows: Tensor, importance: Tensor, size: int, factor: float, block: int = BLOCK) -> Tensor:
    """importance * sqrt(sigma2 + x * x), size x groups; sigma2 is factor times the mean square of the block."""
    sigma2 = ordered_sum(to_groups(rows * rows, block)).mul_(factor / block)  # exact, because it is a power of two
    x = to_groups(rows, size)
    sigma2 = sigma2.repeat_interleave(block // size)
    return exact_sqrt(sigma2 + x * x).mul_(importance_groups(rows, importance, size))


def importance_groups(rows: Tensor, importance: Tensor, size: int) -> Tensor:
    """The importance of every element, size x groups."""
    return to_groups(importance.expand_as(rows), size)


def per_block(groups: Tensor, size: int) -> Tensor:
    """Values of groups of `size` columns as blocks x groups of a block."""
    return groups.reshape(-1, BLOCK // size)


def requantize(x: Tensor, step: Tensor, low: Tensor | None, lowest: int, highest: int, fallback: Tensor) -> Tensor:
    """Levels for rounded scales, N x 256 uint8, counted from 0; where the step is 0, `fallback`'s levels.

    x and fallback are size x groups; step and low have one value per group.
    """
    import torch

    value = (x if low is None else x + low) / step
    level = levels(value, lowest, highest).sub_(lowest)
    level = torch.where(step == 0, fallback, level)
    return level.to(torch.uint8).t().reshape(-1, BLOCK)


def pack_4bit(level: Tensor, distance: int) -> Tensor:
    """Pack two levels per byte: of 2 * distance levels (last dimension), levels l and l + distance share byte l."""
    pairs = level.reshape(len(level), -1, 2, distance)
    return (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(len(level), -1)


def pack_2bit(level: Tensor) -> Tensor:
    """Pack four 2-bit levels per byte: of 128 levels, l, l + 32, l + 64 and l + 96 share byte l."""
    four = (level & 3).reshape(len(level), -1, 4, 32)
    return (four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6).reshape(len(level), -1)


def pack_1bit(bit: Tensor) -> Tensor:
    """Pack one bit of every level: bit k of byte l belongs to level 32 * k + l."""
    planes = bit.reshape(len(bit), 8, 32)
    packed = planes[:, 0].clone()
    for k in range(1, 8):
        packed |= planes[:, k] << k
    return packed


# kernels


@kernel
def transpose_groups(x: Floats, size: int, x_t: Floats) -> None:
    """Transpose groups of `size` elements to size x LANES; lanes beyond the input are zero."""
    groups = x.size // size
    for lane in range(LANES):
        if lane < groups:
            for i in range(size):
                x_t[i, lane] = x[lane * size + i]
        else:
            for i in range(size):
                x_t[i, lane] = np.float32(0)


@kernel
def transpose_importance(importance: Floats, start: int, size: int, w_t: Floats) -> None:
    """The importance of LANES groups from flat position `start` of the rows on, size x LANES."""
    columns = importance.size
    for lane in range(LANES):
        column = (start + lane * size) % columns
        for i in range(size):
            w_t[i, lane] = importance[column + i]


@kernel
def apply_importance(x: Floats, x_t: Floats, factor: float, block: int, w_t: Floats) -> None:
    """Turn importance (w_t) into importance * sqrt(sigma2 + x * x); sigma2 is factor times the block's mean square."""
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
def requantize_numba(
    x: Floats, step: Floats, low: Floats, lowest: int, highest: int, work: Floats, level: Bytes
) -> bool:
    """Levels of one block for rounded scales, counted from 0. Returns whether no step is 0.

    Steps and minima are first copied to all elements, in `work`: one long loop is faster than many short ones.
    """
    bottom, top = np.int32(lowest), np.int32(highest)
    size = x.size // step.size
    complete = True
    for g in range(step.size):
        complete = complete and step[g] != np.float32(0)
        for i in range(g * size, (g + 1) * size):
            work[ELEMENT_STEP, i], work[ELEMENT_MIN, i] = step[g], low[g]
    for i in range(BLOCK):
        q = nearest_int_numba((x[i] + work[ELEMENT_MIN, i]) / work[ELEMENT_STEP, i])
        q = q if q < top else top
        level[i] = np.uint8(np.int32((q if q > bottom else bottom) - bottom))
    return complete


@kernel
def restore_zero_step_levels(step: Floats, level_t: Floats, first: int, level: Bytes) -> None:
    """Restore the search's levels where the step is 0; the block's first group is lane `first`."""
    size = level_t.shape[0]
    for g in range(step.size):
        if step[g] == np.float32(0):
            for i in range(size):
                level[g * size + i] = np.uint8(level_t[i, first + g])


@kernel
def pack_2bit_numba(level: Bytes, out: Bytes) -> None:
    """Pack four 2-bit levels per byte, as `pack_2bit`."""
    for half in range(2):
        for j in range(32):
            a = level[128 * half + j] & 3
            b = level[128 * half + 32 + j] & 3
            c = level[128 * half + 64 + j] & 3
            d = level[128 * half + 96 + j] & 3
            out[32 * half + j] = a | b << 2 | c << 4 | d << 6
