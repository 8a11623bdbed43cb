"""Shared by the K-quants, partly by the 32-column types: importance weights, levels for rounded scales, bit packing.

The functions take x as size x groups (see ggml_math) and levels of blocks as N x 256.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import exact_sqrt, levels, ordered_sum, to_groups

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 256  # ggml's QK_K


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
