"""Q8_0: blocks of 32, a scale in half precision and 32 signed bytes. An importance vector changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_rounding import divided, half_bytes, put_half, quotient
from mergeforge.gguf.quantize.numba_kernel import kernel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeforge.gguf.quantize.ggml_rounding import Bytes, Floats

BELOW_HALF = 0.49999997  # the float32 before 0.5: trunc(x + it) rounds halves away from zero, and nothing below a half


def encoded(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Rows as blocks, in torch."""
    import torch

    x = rows.reshape(-1, 32)
    d = divided(x.abs().amax(1), 127)
    inverse = torch.where(d != 0, quotient(1, d), d)
    level = x * inverse.unsqueeze(1)
    level = level.add_(torch.copysign(torch.full_like(level, BELOW_HALF), level)).trunc_()
    level = torch.where(inverse.isinf().unsqueeze(1), torch.zeros_like(level), level)
    return torch.cat([half_bytes(d), level.to(torch.int8).view(torch.uint8)], 1)


@kernel
def encode_blocks(x: Floats, importance: Floats, out: Bytes) -> None:
    """Rows, flat, as blocks: out is blocks x bytes."""
    bits = x.view(np.int32)
    for b in range(out.shape[0]):
        largest = np.int32(0)
        for i in range(32 * b, 32 * b + 32):  # as integers: a maximum of floats would not fill vector registers
            magnitude = np.int32(bits[i] & np.int32(0x7FFFFFFF))
            largest = magnitude if magnitude > largest else largest
        d = np.int32(largest).view(np.float32) / np.float32(127)
        inverse = np.float32(1) / d if d != np.float32(0) else np.float32(0)
        put_half(out[b], 0, d)
        if inverse == np.float32(np.inf):
            out[b, 2:] = 0
            continue
        for i in range(32):
            v = x[32 * b + i] * inverse
            out[b, 2 + i] = np.uint8(np.int32(v + np.copysign(np.float32(BELOW_HALF), v)))
