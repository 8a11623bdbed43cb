"""Q8_0: blocks of 32, a scale in half precision and 32 signed bytes. It ignores the importance vector, as ggml does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import const_divided_by, divided_by_const, half_bytes, store_half
from mergeforge.gguf.quantize.numba_kernel import kernel
from mergeforge.gguf.quantize.quant_type import QuantType, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_math import Bytes, Floats

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


@kernel
def quantize_numba(x: Floats, importance: Floats, out: Bytes) -> None:
    """Quantize flat rows: `out` is blocks x bytes of a block."""
    bits = x.view(np.int32)
    for b in range(out.shape[0]):
        largest = np.int32(0)
        for i in range(32 * b, 32 * b + 32):  # as integers, because numba does not vectorize a maximum of floats
            magnitude = np.int32(bits[i] & np.int32(0x7FFFFFFF))
            largest = magnitude if magnitude > largest else largest
        d = np.int32(largest).view(np.float32) / np.float32(127)
        inverse = np.float32(1) / d if d != np.float32(0) else np.float32(0)
        store_half(out[b], 0, d)
        if inverse == np.float32(np.inf):
            out[b, 2:] = 0
            continue
        for i in range(32):
            v = x[32 * b + i] * inverse
            out[b, 2 + i] = np.uint8(np.int32(v + np.copysign(np.float32(BELOW_HALF), v)))


register(QuantType("Q8_0", 8, 32, 34, quantize_torch, quantize_numba))
