"""IQ4_NL and IQ4_XS: 16 unevenly spaced levels. Blocks of 32, or of 256 in 8 groups with 6-bit scales.

Bytes of an IQ4_NL block: d (half precision), 16 with two 4-bit levels each. Of an IQ4_XS block: d, 2 with the scales'
upper two bits, 4 with their lower four bits, 128 with two 4-bit levels each. ggml finds the nearest level by bisection
(best_index_int8). Here the level is the number of midpoints that are not above the element. That is the same number,
because the midpoints are exact in float32.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import (
    GROUP_MAX_EPS,
    const_divided_by,
    divided_by_const,
    half_bytes,
    nearest_int,
    ordered_sum,
    signed_absmax,
    to_groups,
)
from mergeforge.gguf.quantize.k_quants import (
    importance_weights,
    pack_4bit,
    per_block,
)
from mergeforge.gguf.quantize.quant_type import QuantType, register

if TYPE_CHECKING:
    from torch import Tensor


VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIDPOINTS = tuple((a + b) / 2 for a, b in pairwise(VALUES))
OFFSETS = 7  # the element of the largest magnitude is tried at -127 - 7 to -127 + 7


def quantize_torch(block: int, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows to blocks of 32 (IQ4_NL) or 256 (IQ4_XS) with torch, as ggml's quantize_row_iq4_nl_impl()."""
    import torch

    x = to_groups(rows, 32)
    weight = x * x if importance is None else importance_weights(rows, importance, 32, 2, block)
    scale = fit_scale(x, weight)
    if block == 32:
        return torch.cat([half_bytes(scale), pack_4bit(_levels(x, _inverse(scale)), 16)], 1)
    scales = per_block(scale, 32)
    d = divided_by_const(-signed_absmax(scales.t()), 32)
    level = nearest_int(_inverse(d).unsqueeze(1) * scales).clamp_(-32, 31)
    step = (d.unsqueeze(1) * level).reshape(-1)
    packed = pack_4bit(_levels(x, _inverse(step)), 16).reshape(len(d), -1)
    return torch.cat([half_bytes(d), _pack_scales(level + 32), packed], 1)


def fit_scale(x: Tensor, weight: Tensor) -> Tensor:
    """The scale of every group of x (n x N) with the smallest weighted error."""
    import torch

    absmax = signed_absmax(x)
    sum_qx, sum_q2 = _sums(x, weight, const_divided_by(1, divided_by_const(-absmax, VALUES[0])))
    scale = torch.where(sum_q2 > 0, sum_qx / sum_q2, torch.zeros_like(absmax))
    best = scale * sum_qx
    for offset in range(-OFFSETS, OFFSETS + 1):
        sum_qx, sum_q2 = _sums(x, weight, const_divided_by(offset + VALUES[0], absmax))
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
    return torch.where(absmax.abs() < GROUP_MAX_EPS, torch.zeros_like(scale), scale)


def _sums(x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    values = torch.tensor(VALUES, dtype=torch.float32, device=x.device)
    value = values[_index(inverse * x)]
    product = weight * value
    return ordered_sum(product * x), ordered_sum(product.mul_(value))


def _index(value: Tensor) -> Tensor:
    import torch

    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float32, device=value.device)
    return torch.bucketize(value, midpoints, right=True)


def _levels(x: Tensor, inverse: Tensor) -> Tensor:
    import torch

    return _index(inverse * x).to(torch.uint8).t().contiguous()


def _inverse(value: Tensor) -> Tensor:
    import torch

    return torch.where(value != 0, const_divided_by(1, value), torch.zeros_like(value))


def _pack_scales(level: Tensor) -> Tensor:
    import torch

    high, low = level >> 4, level & 15
    pairs = [
        high[:, 4 * k] | high[:, 4 * k + 1] << 2 | high[:, 4 * k + 2] << 4 | high[:, 4 * k + 3] << 6 for k in range(2)
    ]
    return torch.cat([torch.stack(pairs, 1), low[:, ::2] | low[:, 1::2] << 4], 1).to(torch.uint8)


register(QuantType("IQ4_NL", 20, 32, 18, partial(quantize_torch, 32)))
register(QuantType("IQ4_XS", 23, 256, 136, partial(quantize_torch, 256)))
