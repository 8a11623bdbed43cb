"""Q1_0, Q2_0, TQ1_0 and TQ2_0: a scale in half precision and one or two bits, or a ternary digit, for each element.

TQ1_0 and TQ2_0 are for models that were trained with ternary weights (BitNet). All ignore the importance vector, as in
ggml. Bytes of a block: Q1_0 (128 elements): d, 16 with a bit each, set unless the element is negative; Q2_0 (64): d, 16
with two bits each; TQ2_0 (256): 64 with two bits each, d; TQ1_0 (256): 48 with five digits each, 4 with four, d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import const_divided_by, half_bytes, ordered_sum, to_groups
from mergeforge.gguf.quantize.k_quants import BLOCK, pack_2bit
from mergeforge.gguf.quantize.quant_type import QuantType, register

if TYPE_CHECKING:
    from torch import Tensor


def quantize_q1_0(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q1_0()."""
    import torch

    mean = ordered_sum(to_groups(rows.abs(), 128)) / 128
    bit = (rows.reshape(-1, 16, 8) >= 0).to(torch.uint8)
    packed = bit[:, :, 0].clone()
    for k in range(1, 8):
        packed |= bit[:, :, k] << k
    return torch.cat([half_bytes(mean), packed], 1)


def quantize_q2_0(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q2_0()."""
    import torch

    d, digit = ternary_digits(rows.reshape(-1, 64), 0)
    four = digit.reshape(len(d), 16, 4)
    packed = four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6
    return torch.cat([half_bytes(d), packed], 1)


def quantize_tq2_0(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_tq2_0()."""
    import torch

    d, digit = ternary_digits(rows.reshape(-1, BLOCK), 1)
    return torch.cat([pack_2bit(digit[:, :128]), pack_2bit(digit[:, 128:]), half_bytes(d)], 1)


def quantize_tq1_0(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_tq1_0()."""
    import torch

    d, digit = ternary_digits(rows.reshape(-1, BLOCK), 1)
    packed = [pack_ternary(digit[:, :160], 32), pack_ternary(digit[:, 160:240], 16), pack_ternary(digit[:, 240:], 4)]
    return torch.cat([*packed, half_bytes(d)], 1)


def ternary_digits(x: Tensor, tiny: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each row of x, and for each element the nearest of -1, 0 and 1 in it, plus 1.

    Where the inverse of the magnitude is infinite, every digit is `tiny`: what ggml's conversion to integers gives.
    """
    import torch

    d = x.abs().amax(1)
    inverse = torch.where(d > 0, const_divided_by(1, d), d).unsqueeze(1)
    value = x * inverse
    digit = 1 + (value >= 0.5).to(torch.uint8) - (value <= -0.5).to(torch.uint8)
    return d, torch.where(inverse.isinf(), torch.full_like(digit, tiny), digit)


def pack_ternary(digit: Tensor, count: int) -> Tensor:
    """`count` bytes with up to five digits each, `count` elements apart, the first one most significant.

    The number is scaled from 243 to 256, so that digits are read by multiplying with 3.
    """
    import torch

    groups = digit.reshape(len(digit), -1, count).int()
    number = groups[:, 0]
    for k in range(1, 5):
        number = number * 3 + (groups[:, k] if k < groups.shape[1] else 0)
    return torch.div(number * 256 + 242, 243, rounding_mode="floor").to(torch.uint8)


register(QuantType("TQ1_0", 34, BLOCK, 54, quantize_tq1_0))
register(QuantType("TQ2_0", 35, BLOCK, 66, quantize_tq2_0))
register(QuantType("Q1_0", 41, 128, 18, quantize_q1_0))
register(QuantType("Q2_0", 42, 64, 18, quantize_q2_0))
