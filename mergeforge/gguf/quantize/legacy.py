"""Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 with one scale; the _1 types also have a minimum.

Bytes of a block: d and, for _1, the minimum (half precision); for 5 bits, 4 bytes with the fifth bits; 16 bytes with
two 4-bit levels each. With an importance vector ggml searches for the scale (make_qx_quants, make_qkx3_quants).
Without one it takes the scale from the block's range or largest element.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    const_divided_by,
    divided_by_const,
    exact_sqrt,
    first_min,
    half_bytes,
    ordered_sum,
    positive_part,
    signed_absmax,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    importance_groups,
    pack_4bit,
)
from mergeforge.gguf.quantize.quant_type import QuantType, register
from mergeforge.gguf.quantize.search_scale import (
    fit_scale,
)
from mergeforge.gguf.quantize.search_scale_min import (
    fit_scale_min,
    importance_search,
    levels_of_fit,
)

if TYPE_CHECKING:
    from torch import Tensor


def quantize_torch(bits: int, with_min: bool, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_q4_0(), quantize_q4_1(), quantize_q5_0() and quantize_q5_1()."""
    import torch

    x = to_groups(rows, 32)
    if importance is None:
        d, low, level = _from_range(x, bits) if with_min else _from_absmax(x, bits)
    else:
        d, low, level = _with_importance(rows, importance, x, bits, with_min)
    level = level.to(torch.uint8).t().contiguous()
    fields = [half_bytes(d)]
    fields += [half_bytes(low)] if with_min else []
    fields += [_pack_fifth_bits(level)] if bits == 5 else []
    return torch.cat([*fields, pack_4bit(level, 16)], 1)


def _from_absmax(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    half = 1 << (bits - 1)
    absmax = signed_absmax(x)
    d = divided_by_const(absmax, -half)
    return d, d, _truncated(x, d, half + 0.5, 2 * half - 1)


def _from_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = (1 << bits) - 1
    low = first_min(x)
    d = positive_part(divided_by_const(x.amax(0) - low, top))  # not -0 when the block holds zeros of both signs
    return d, low, _truncated(x - low, d, 0.5, top)


def _truncated(x: Tensor, d: Tensor, shift: float, top: int) -> Tensor:
    import torch

    inverse = torch.where(d != 0, const_divided_by(1, d), torch.zeros_like(d))
    level = (x * inverse).add_(shift).trunc_().clamp_(max=top)
    return torch.where(inverse.isinf(), torch.zeros_like(level), level)  # what C's conversion of inf and NaN gives


def _with_importance(
    rows: Tensor, importance: Tensor, x: Tensor, bits: int, with_min: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sigma2 = divided_by_const(ordered_sum((rows * rows).t()), rows.shape[1]).repeat_interleave(rows.shape[1] // 32)
    weight = exact_sqrt(sigma2 + x * x).mul_(importance_groups(rows, importance, 32))
    if with_min:
        search = importance_search((1 << bits) - 1)
        min_fit = fit_scale_min(x, weight, search)
        return min_fit.scale, min_fit.minimum, levels_of_fit(x, min_fit, search)
    fit = fit_scale(x, weight, 1 << (bits - 1))
    return fit.scale, fit.scale, fit.level


def _pack_fifth_bits(level: Tensor) -> Tensor:
    import torch

    bit = (level >> 4).reshape(-1, 4, 8)
    bit_index = torch.arange(8, dtype=torch.uint8, device=level.device)
    return (bit << bit_index).sum(2, dtype=torch.uint8)


def _register(name: str, number: int, nbytes: int, bits: int, *, with_min: bool) -> None:
    register(QuantType(name, number, 32, nbytes, partial(quantize_torch, bits, with_min)))


_register("Q4_0", 2, 18, bits=4, with_min=False)
_register("Q4_1", 3, 20, bits=4, with_min=True)
_register("Q5_0", 6, 22, bits=5, with_min=False)
_register("Q5_1", 7, 24, bits=5, with_min=True)
