"""F32, F16 and BF16: no blocks, only rounding to nearest, halves to even."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def encoded(name: str, rows: Tensor) -> Tensor:
    """Rows as bytes; little-endian, as all machines that torch runs on are."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    return rows.to(dtype, copy=True).view(torch.uint8)
