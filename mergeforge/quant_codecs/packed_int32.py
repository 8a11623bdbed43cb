"""Small integers packed into 32-bit words: GPTQ, AWQ and compressed-tensors differ in which goes where.

* GPTQ (AutoGPTQ's nn_modules/qlinear): weights (in * bits / 32, out), rows of a word from its lowest
  bits up; zero points (groups, out * bits / 32) are one too small unless the format is gptq_v2.
* AWQ (AutoAWQ's utils/packing_utils.py, "gemm"): weights (in, out / 8), zero points (groups, out / 8);
  a word's four-bit pieces are the outputs 0, 2, 4, 6, 1, 3, 5, 7.
* compressed-tensors (compressors/pack_quantized): weights (out, in * bits / 32), zero points
  (out * bits / 32, groups), both with 2^(bits-1) added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the outputs of a word, in their order


def unpack_rows(words: Tensor, bits: int, places: Sequence[int] = ()) -> Tensor:
    """(rows, n) int32 words as (rows, n * 32 / bits) integers; `places` of each within a word."""
    import torch

    shifts = torch.tensor(places or range(32 // bits), dtype=torch.int32, device=words.device) * bits
    found = words.unsqueeze(-1) >> shifts
    return found.bitwise_and_((1 << bits) - 1).flatten(1)


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """(n, columns) int32 words as (n * 32 / bits, columns) integers."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    found = words.unsqueeze(1) >> shifts.view(1, -1, 1)
    return found.bitwise_and_((1 << bits) - 1).flatten(0, 1)


def gptq_zero_point_offset(zeros: Tensor, bits: int) -> Tensor:
    """GPTQ's zero points, which are stored one too small: the largest stands for 0, as in AutoGPTQ's torch code."""
    return (zeros + 1).bitwise_and_((1 << bits) - 1)


def dequantize_gptq_awq(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """(codes - zeros) * scales, float32; codes (in, out) int32, zeros and scales (groups, out), groups (in,).

    `groups` says which row of the scales each input has (GPTQ's g_idx). Overwrites codes.
    """
    codes.sub_(zeros.index_select(0, groups))
    return codes.float().mul_(scales.float().index_select(0, groups))


def dequantize_by_row(codes: Tensor, zeros: Tensor | int, scales: Tensor, groups: Tensor | None) -> Tensor:
    """(codes - zeros) * scales, float32; codes (out, in) int32, zeros and scales (out, groups) or (1, 1).

    `groups` (in,): which of the scales each column has; None: equally many columns follow one another.
    Overwrites codes.
    """
    if groups is not None:
        zeros = zeros if isinstance(zeros, int) else zeros.index_select(1, groups)
        return codes.sub_(zeros).float().mul_(scales.float().index_select(1, groups))
    shape = (len(codes), scales.shape[1], -1)
    codes.view(shape).sub_(zeros if isinstance(zeros, int) else zeros.unsqueeze(-1))
    values = codes.float()
    values.view(shape).mul_(scales.float().unsqueeze(-1))
    return values
