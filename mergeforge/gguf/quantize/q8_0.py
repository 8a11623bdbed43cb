"""Q8_0: blocks of 32, a scale in half precision and 32 signed bytes. It ignores the importance vector, as ggml does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import const_divided_by, divided_by_const, half_bytes
from mergeforge.gguf.quantize.quant_type import QuantType, register

if TYPE_CHECKING:
    from torch import Tensor


BELOW_HALF = 0.49999997  # the float32 before 0.5: trunc(x + it) rounds as C's roundf(), halves away from zero


def quantize_torch(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q8_0()."""
    import torch

    x = rows.reshape(-1, 32)
    d = divided_by_const(x.abs().amax(1), 127)
    inverse = torch.where(d != 0, const_divided_by(1, d), d)
    level = x * inverse.unsqueeze(1)
    level = level.add_(torch.copysign(torch.full_like(level, BELOW_HALF), level)).trunc_()
    level = torch.where(inverse.isinf().unsqueeze(1), torch.zeros_like(level), level)
    return torch.cat([half_bytes(d), level.to(torch.int8).view(torch.uint8)], 1)


register(QuantType("Q8_0", 8, 32, 34, quantize_torch))
