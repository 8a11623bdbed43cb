"""Two 4-bit codes in a byte: looked up together, so that each byte costs one access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# FP4 E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def byte_table(levels: Sequence[float] | Tensor, *, high_first: bool) -> Tensor:
    """(256,) int64: the two float32 values of every byte, the one of the high four bits first or last."""
    import torch

    values = torch.as_tensor(levels, dtype=torch.float32)
    codes = torch.arange(256, device=values.device)
    both = [values[codes >> 4], values[codes & 15]]
    return torch.stack(both if high_first else both[::-1], dim=1).view(torch.int64).flatten()


def unpack_4bit(raw: Tensor, table: Tensor) -> Tensor:
    """The values of packed bytes (uint8, any shape), flat: float32, two for each byte."""
    import torch

    return table.index_select(0, raw.flatten().int()).view(torch.float32)
