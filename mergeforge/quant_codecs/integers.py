"""Integer formats: 8-bit integers, and smaller ones packed into 32-bit words.

GPTQ, AWQ and compressed-tensors pack integers in different orders:

* GPTQ (AutoGPTQ's nn_modules/qlinear): weights (in * bits / 32, out); a word holds consecutive rows from its lowest
  bits up. Zero points (groups, out * bits / 32) are stored one too small, unless the format is gptq_v2.
* AWQ (AutoAWQ's utils/packing_utils.py, "gemm"): weights (in, out / 8), zero points (groups, out / 8). The eight 4-bit
  codes of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7.
* compressed-tensors (compressors/pack_quantized): weights (out, in * bits / 32), zero points (out * bits / 32, groups),
  both with 2^(bits-1) added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PER_STEP = 7.874015718698502e-3  # 1/127, as bitsandbytes writes it (backends/default, int8_vectorwise_dequant)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # position in the word of each of its eight outputs


def dequantize_rowwise(weight: Tensor, row_absmax: Tensor) -> Tensor:
    """bitsandbytes' LLM.int8 (arXiv 2208.07339): int8 rows times their largest magnitude / 127."""
    return weight.float().mul_(row_absmax.view(-1, 1)).mul_(PER_STEP)


def dequantize_int8(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """(weight - zeros) * scales; scales and zeros are (rows, groups of equally many columns) or (1, 1)."""
    values = weight.float()
    groups = values.view(values.shape[0], scales.shape[1], -1)
    if zeros is not None:
        groups.sub_(zeros.float().unsqueeze(-1))
    groups.mul_(scales.float().unsqueeze(-1))
    return values


def unpack_rows(words: Tensor, bits: int, order: Sequence[int] = ()) -> Tensor:
    """(rows, n) int32 words as (rows, n * 32 / bits) integers; `order`: the position of each within a word."""
    import torch

    shifts = torch.tensor(order or range(32 // bits), dtype=torch.int32, device=words.device) * bits
    codes = words.unsqueeze(-1) >> shifts
    return codes.bitwise_and_((1 << bits) - 1).flatten(1)


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """(n, columns) int32 words as (n * 32 / bits, columns) integers."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = words.unsqueeze(1) >> shifts.view(1, -1, 1)
    return codes.bitwise_and_((1 << bits) - 1).flatten(0, 1)


def gptq_zero_point_offset(zeros: Tensor, bits: int) -> Tensor:
    """GPTQ's zero points, which are stored one too small; the largest means 0, as in AutoGPTQ's torch code."""
    return (zeros + 1).bitwise_and_((1 << bits) - 1)


def dequantize_gptq_awq(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """(codes - zeros) * scales, float32; codes (in, out) int32, zeros and scales (groups, out), groups (in,).

    `groups` names the row of the scales for each input (GPTQ's g_idx). Overwrites codes.
    """
    codes.sub_(zeros.index_select(0, groups))
    return codes.float().mul_(scales.float().index_select(0, groups))


def dequantize_by_row(codes: Tensor, zeros: Tensor | int, scales: Tensor, groups: Tensor | None) -> Tensor:
    """(codes - zeros) * scales, float32; codes (out, in) int32, zeros and scales (out, groups) or (1, 1).

    `groups` (in,) names the scale of each column; None: groups of equally many consecutive columns. Overwrites codes.
    """
    if groups is not None:
        zeros = zeros if isinstance(zeros, int) else zeros.index_select(1, groups)
        return codes.sub_(zeros).float().mul_(scales.float().index_select(1, groups))
    shape = (len(codes), scales.shape[1], -1)
    codes.view(shape).sub_(zeros if isinstance(zeros, int) else zeros.unsqueeze(-1))
    values = codes.float()
    values.view(shape).mul_(scales.float().unsqueeze(-1))
    return values
