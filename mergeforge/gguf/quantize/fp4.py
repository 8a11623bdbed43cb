"""MXFP4 and NVFP4: 4-bit floats (E2M1) with a scale of 8 bits for 32 or 16 elements.

Bytes of an MXFP4 block: the scale (E8M0), 16 with two elements each. Of an NVFP4 block: four scales (UE4M3), for 16
elements each, 32 with two elements each. They ignore the importance vector, as in ggml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.gguf.quantize.ggml_math import divided_by_const
from mergeforge.gguf.quantize.k_quants import pack_4bit
from mergeforge.gguf.quantize.quant_type import QuantType, register

if TYPE_CHECKING:
    from torch import Tensor


MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # twice E2M1's; scales are halved instead
# log2f() rounds to the next integer n if x is 2^n - j units in its last place, and j at most this; by n's exponent.
MOST_BELOW = (0, 1, 2, 5, 11, 22, 44, 88)
SUBNORMAL = 2.0**-126  # where float32's exponent ends
SMALLEST = 2.0**-6  # of UE4M3, with all bits


def quantize_mxfp4(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_mxfp4()."""
    import torch

    x = rows.reshape(-1, 32)
    largest = x.abs().amax(1)
    scale = torch.where(largest > 0, floor_log2(largest) + 125 & 0xFF, torch.zeros_like(largest, dtype=torch.int32))
    half = torch.where(scale < 2, 0x200000 << scale.clamp(0, 1), scale - 1 << 23).view(torch.float32)
    return torch.cat([scale.to(torch.uint8).unsqueeze(1), pack_4bit(nearest_fp4(x, half), 16)], 1)


def quantize_nvfp4(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize rows with torch, as ggml's quantize_nvfp4()."""
    import torch

    x = rows.reshape(-1, 16)
    scale = to_ue4m3(divided_by_const(x.abs().amax(1), 6))
    packed = pack_4bit(nearest_fp4(x, half_of_ue4m3(scale)), 8)
    return torch.cat([scale.to(torch.uint8).reshape(-1, 4), packed.reshape(-1, 32)], 1)


def nearest_fp4(x: Tensor, half_scale: Tensor) -> Tensor:
    """The index of the E2M1 number nearest to each element; of two, the smaller. Zero has no sign.

    The differences are compared after rounding, as ggml does.
    """
    import torch

    absolute = x.abs()
    index, least = torch.zeros_like(x, dtype=torch.uint8), absolute.clone()
    for at, magnitude in enumerate(MAGNITUDES[1:], 1):
        difference = (half_scale * magnitude).unsqueeze(1).sub(absolute).abs_()
        better = difference < least
        index.masked_fill_(better, at)
        least = torch.where(better, difference, least)
    return torch.where((index > 0) & (x < 0), index + 8, index)


def floor_log2(x: Tensor) -> Tensor:
    """floor(log2f(x)) of positive x, with log2f()'s rounding."""
    import torch

    shift = torch.where(x < SUBNORMAL, 24, 0).int()
    bits = torch.where(x < SUBNORMAL, x * 2.0**24, x).view(torch.int32)
    following, below = (bits >> 23) - 126 - shift, 0x800000 - (bits & 0x7FFFFF)
    distance = torch.where(following > 0, following - 1, -following)  # the float before n has the exponent of this
    exponent = torch.frexp(distance.clamp_min(1).float())[1] - 1
    most = torch.tensor(MOST_BELOW, dtype=torch.int32, device=x.device)[exponent.long()]
    return torch.where((distance > 0) & (below <= most), following, following - 1)


def to_ue4m3(x: Tensor) -> Tensor:
    """The nearest UE4M3 number, halves up, as int32; from 248 on, ggml takes 448."""
    import torch

    small = (x.clamp_max(SMALLEST) * 512 + 0.5).int().clamp_max(7)
    rounded = ((x.view(torch.int32) + 0x80000) >> 20) - (120 << 3)
    return torch.where(x < SMALLEST, small, torch.where(rounded < 15 << 3, rounded, 0x7E))


def half_of_ue4m3(scale: Tensor) -> Tensor:
    import torch

    return torch.where(scale < 8, scale.float() * 2.0**-10, (scale + (119 << 3) << 20).view(torch.float32))


register(QuantType("MXFP4", 39, 32, 17, quantize_mxfp4))
register(QuantType("NVFP4", 40, 64, 36, quantize_nvfp4))
