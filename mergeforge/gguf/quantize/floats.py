"""F32, F16 and BF16: no blocks, only rounding to nearest, halves to even."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.quant_type import QuantType, register

if TYPE_CHECKING:
    from torch import Tensor


def cast(dtype: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as bytes of torch's `dtype`; little-endian, as every machine that torch runs on is."""
    import torch

    return rows.to(getattr(torch, dtype), copy=True).view(torch.uint8)


register(QuantType("F32", 0, 1, 4, partial(cast, "float32")))
register(QuantType("F16", 1, 1, 2, partial(cast, "float16")))
register(QuantType("BF16", 30, 1, 2, partial(cast, "bfloat16")))
