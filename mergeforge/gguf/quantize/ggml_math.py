"""Arithmetic in torch that rounds as ggml's C code does: integers, half precision, ordered sums.

Plain torch would differ in three ways. It computes constant / tensor as a reciprocal and a product (on CUDA also
tensor / constant), so both operands are made tensors here. Its float32 square root on a CPU can be 1 ulp off, so it is
taken in float64. It may sum a dimension in any order, so rows are added one by one.

A batch of groups is n x N: row i holds element i of every group. So operations run over all groups, while the sums of
each group keep C's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING_MAGIC = 12582912.0  # 1.5 * 2**23: added to a float32, leaves the nearest integer in the low bits
MANTISSA_MASK = 0x7FFFFF
MAGIC_MANTISSA = 0x400000
GROUP_MAX_EPS = 1e-15  # ggml's name and value; a group whose largest magnitude is below it counts as zero


def to_groups(rows: Tensor, size: int) -> Tensor:
    """Rows as groups of `size` elements, size x groups."""
    return rows.reshape(-1, size).t().contiguous()


def nearest_int(value: Tensor) -> Tensor:
    """The nearest int32, halves to even. Equals ggml's nearest_int() outside of +-2**22 too, where that is wrong."""
    import torch

    value = torch.where(value == value, value, torch.zeros_like(value))  # NaN has other bits on CUDA
    return ((value + ROUNDING_MAGIC).view(torch.int32) & MANTISSA_MASK) - MAGIC_MANTISSA


def levels(value: Tensor, low: int, high: int) -> Tensor:
    """The nearest integer, clamped to [low, high], as float32."""
    return nearest_int(value).clamp_(low, high).float()


def const_divided_by(constant: float, value: Tensor) -> Tensor:
    """constant / value, rounded once."""
    import torch

    return torch.full_like(value, constant) / value


def divided_by_const(value: Tensor, constant: float) -> Tensor:
    """value / constant, rounded once."""
    import torch

    return value / torch.full_like(value, constant)


def exact_sqrt(value: Tensor) -> Tensor:
    """The square root, correctly rounded."""
    return value.double().sqrt().float()


def ordered_sum(rows: Tensor) -> Tensor:
    """The sum over the first dimension, row by row."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def positive_part(value: Tensor) -> Tensor:
    """Values above zero, and 0 for all others (clamp would keep -0)."""
    import torch

    return torch.where(value > 0, value, torch.zeros_like(value))


def signed_absmax(rows: Tensor) -> Tensor:
    """The first element of the largest magnitude of each column, with its sign."""
    import torch

    absmax = torch.zeros_like(rows[0])
    for row in rows:
        absmax = torch.where(row.abs() > absmax.abs(), row, absmax)
    return absmax


def first_min(rows: Tensor) -> Tensor:
    """The smallest element of each column; if it is zero, the first zero with its sign."""
    import torch

    lowest = rows[0]
    for row in rows[1:]:
        lowest = torch.where(row < lowest, row, lowest)
    return lowest


def half_bytes(value: Tensor) -> Tensor:
    """N values in half precision, as N x 2 bytes."""
    import torch

    return value.half().unsqueeze(1).contiguous().view(torch.uint8)
