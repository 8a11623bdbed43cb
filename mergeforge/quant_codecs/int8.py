"""8-bit integers with one scale a row, a tensor, or a group of columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PER_STEP = 7.874015718698502e-3  # 1/127, as bitsandbytes writes it (backends/default, int8_vectorwise_dequant)


def dequantize_rowwise(weight: Tensor, maxima: Tensor) -> Tensor:
    """bitsandbytes' LLM.int8 (arXiv 2208.07339): int8 rows, each times its largest magnitude / 127."""
    return weight.float().mul_(maxima.view(-1, 1)).mul_(PER_STEP)


def dequantize_int8(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """(weight - zeros) * scales; scales and zeros are (rows, groups) or (1, 1), a group is equally many columns."""
    values = weight.float()
    groups = values.view(values.shape[0], scales.shape[1], -1)
    if zeros is not None:
        groups.sub_(zeros.float().unsqueeze(-1))
    groups.mul_(scales.float().unsqueeze(-1))
    return values
