"""Arithmetic that rounds as ggml's C code does, in torch and in kernels: integers, half precision, ordered sums.

Plain torch would differ in three ways. It computes constant / tensor as a reciprocal and a product (on CUDA also
tensor / constant), so both operands are made tensors here. Its float32 square root on a CPU can be 1 ulp off, so it is
taken in float64. It may sum a dimension in any order, so rows are added one by one.

In torch a batch of groups is n x N: row i holds element i of every group. Kernels take `LANES` groups at a time in the
same layout. So a loop over groups can be vectorized, while the sums of each group keep C's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]

LANES = 128  # groups at a time: 32 x 128 floats are 16 KiB; with 64, starting the loops takes too long
ROUNDING_MAGIC = 12582912.0  # 1.5 * 2**23: added to a float32, leaves the nearest integer in the low bits
MANTISSA_MASK = 0x7FFFFF
MAGIC_MANTISSA = 0x400000
GROUP_MAX_EPS = 1e-15  # ggml's name and value; a group whose largest magnitude is below it counts as zero


# torch


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


# kernels


@kernel
def lane_buffer(rows: int) -> Floats:
    """A buffer of rows x LANES, aligned to 64 bytes, because loads across cache lines take twice as long."""
    flat = np.empty(rows * LANES + 16, np.float32)
    start = (-(flat.ctypes.data >> 2)) & 15
    return flat[start : start + rows * LANES].reshape((rows, LANES))


@kernel
def nearest_int_numba(value: np.float32) -> Any:  # an np.int32, which mypy does not mix with int
    """The nearest integer, as `nearest_int`."""
    bits = np.float32(value + np.float32(ROUNDING_MAGIC)).view(np.int32)
    return np.int32(np.int32(bits & np.int32(MANTISSA_MASK)) - np.int32(MAGIC_MANTISSA))


@kernel
def half_from_float(value: np.float32) -> int:
    """The half-precision bits of a float32, rounded to nearest, halves to even (ggml_fp32_to_fp16)."""
    bits = int(np.float32(value).view(np.int32))
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    if magnitude >= 0x47800000:
        return sign | 0x7C00
    if magnitude >= 0x38800000:
        shifted = magnitude - 0x38000000
        return sign | ((shifted + 0xFFF + ((shifted >> 13) & 1)) >> 13)
    return sign | int(nearest_int_numba(np.float32(abs(value) * np.float32(16777216.0))))


@kernel
def float_from_half(bits: int) -> np.float32:
    """The float32 of half-precision bits (ggml_fp16_to_fp32)."""
    exponent = (bits >> 10) & 31
    mantissa = bits & 0x3FF
    if exponent == 31:
        value = np.float32(np.inf)
    elif exponent:
        value = np.int32(((exponent + 112) << 23) | (mantissa << 13)).view(np.float32)
    else:
        value = np.float32(np.float32(mantissa) * np.float32(5.9604644775390625e-08))
    return np.float32(-value) if bits & 0x8000 else value


@kernel
def store_half(out: Bytes, offset: int, value: np.float32) -> np.float32:
    """Write a value in half precision; returns the rounded value."""
    bits = half_from_float(value)
    out[offset] = bits & 0xFF
    out[offset + 1] = bits >> 8
    return float_from_half(bits)
