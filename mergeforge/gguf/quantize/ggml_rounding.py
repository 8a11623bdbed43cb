"""Rounding as ggml's C code does it, in torch and in kernels: the nearest integer, half precision, sums in order.

What torch would do differently, and the sums and quotients that avoid it: a constant divided by a tensor
is a reciprocal and a product (on CUDA a tensor divided by a constant too), so both are made tensors; the
CPU's float32 root can be 1 ulp off, so roots are taken in float64; a sum over a dimension may be taken in
any order, so rows are added one by one.

In torch a batch of groups is n x N: element i of every group is row i. Kernels take `LANES` groups at a
time in the same layout, so that a loop over groups fills vector registers while each group's sums stay in C's order.
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

LANES = 128  # groups at a time: 16 KiB of 32 x 128 floats; 64 spend too long on starting loops
MAGIC = 12582912.0  # 1.5 * 2**23: added to a float32, it leaves the nearest integer (halves to even) in the low bits
MANTISSA = 0x7FFFFF
MIDDLE = 0x400000
EPSILON = 1e-15  # below it ggml takes a group for zero


# torch


def grouped(rows: Tensor, size: int) -> Tensor:
    """Rows as groups of `size` elements: size x groups."""
    return rows.reshape(-1, size).t().contiguous()


def nearest(value: Tensor) -> Tensor:
    """The nearest int32, halves to even; outside of +-2**22 what ggml's nearest_int() happens to give, too."""
    import torch

    value = torch.where(value == value, value, torch.zeros_like(value))  # CUDA's NaN has other bits
    return ((value + MAGIC).view(torch.int32) & MANTISSA) - MIDDLE


def levels(value: Tensor, low: int, high: int) -> Tensor:
    """The nearest integer within [low, high], as float32."""
    return nearest(value).clamp_(low, high).float()


def quotient(constant: float, value: Tensor) -> Tensor:
    """constant / value, rounded once."""
    import torch

    return torch.full_like(value, constant) / value


def divided(value: Tensor, constant: float) -> Tensor:
    """value / constant, rounded once."""
    import torch

    return value / torch.full_like(value, constant)


def root(value: Tensor) -> Tensor:
    """The square root, correctly rounded."""
    return value.double().sqrt().float()


def ordered_sum(rows: Tensor) -> Tensor:
    """The sum over the first dimension, in order."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def positive(value: Tensor) -> Tensor:
    """Values above zero; 0 for the rest (clamp would keep -0)."""
    import torch

    return torch.where(value > 0, value, torch.zeros_like(value))


def first_peak(rows: Tensor) -> Tensor:
    """The first element of each column whose magnitude is the largest, with its sign."""
    import torch

    peak = torch.zeros_like(rows[0])
    for row in rows:
        peak = torch.where(row.abs() > peak.abs(), row, peak)
    return peak


def first_lowest(rows: Tensor) -> Tensor:
    """The smallest element of each column; of zeros the first, with its sign."""
    import torch

    lowest = rows[0]
    for row in rows[1:]:
        lowest = torch.where(row < lowest, row, lowest)
    return lowest


def half_bytes(value: Tensor) -> Tensor:
    """N values as N x 2 bytes of half precision."""
    import torch

    return value.half().unsqueeze(1).contiguous().view(torch.uint8)


# kernels


@kernel
def lanes(rows: int) -> Floats:
    """A buffer of rows x LANES that begins at a multiple of 64 bytes: loads across cache lines take twice as long."""
    flat = np.empty(rows * LANES + 16, np.float32)
    start = (-(flat.ctypes.data >> 2)) & 15
    return flat[start : start + rows * LANES].reshape((rows, LANES))


@kernel
def nearest_level(value: np.float32) -> Any:  # an np.int32, which mypy does not mix with int
    """The nearest integer, as `nearest`."""
    bits = np.float32(value + np.float32(MAGIC)).view(np.int32)
    return np.int32(np.int32(bits & np.int32(MANTISSA)) - np.int32(MIDDLE))


@kernel
def half_bits(value: np.float32) -> int:
    """The bits of a float32 in half precision, rounded to nearest, halves to even."""
    bits = int(np.float32(value).view(np.int32))
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    if magnitude >= 0x47800000:
        return sign | 0x7C00
    if magnitude >= 0x38800000:
        shifted = magnitude - 0x38000000
        return sign | ((shifted + 0xFFF + ((shifted >> 13) & 1)) >> 13)
    return sign | int(nearest_level(np.float32(abs(value) * np.float32(16777216.0))))


@kernel
def half_value(bits: int) -> np.float32:
    """The float32 that these bits mean in half precision."""
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
def put_half(out: Bytes, at: int, value: np.float32) -> np.float32:
    """Write a value in half precision; what it is then."""
    bits = half_bits(value)
    out[at] = bits & 0xFF
    out[at + 1] = bits >> 8
    return half_value(bits)
