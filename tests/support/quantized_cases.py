"""Every format, written by hand: a weight as its stored tensors, and what they stand for as one dense formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from mergeforge.quant_codecs.nf4 import NF4
from mergeforge.quant_codecs.packed_4bit import E2M1

Tensor = torch.Tensor
Stored = dict[str, Tensor]  # by what follows the module's name
Settings = dict[str, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs that a word's four-bit pieces hold, from the lowest


def nearest(values: Tensor, levels: Any) -> Tensor:
    """Indices of the nearest levels."""
    return (values.float().unsqueeze(-1) - torch.tensor(levels)).abs().argmin(-1)


def into_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) codes, 32 / bits in an int32 word, the first lowest."""
    pieces = codes.long().view(len(codes), -1, 32 // bits) << (torch.arange(32 // bits) * bits)
    words = pieces.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def into_bytes(codes: Tensor, *, high_first: bool) -> Tensor:
    """Pairs of 4-bit codes as bytes."""
    one, two = codes[..., ::2], codes[..., 1::2]
    return (one * 16 + two if high_first else one + two * 16).to(torch.uint8)


def nf4(weight: Tensor) -> tuple[Stored, Tensor, Settings]:
    flat = weight.float().view(-1, 64)
    largest = flat.abs().amax(1)
    codes = nearest(flat / largest[:, None], NF4)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {
        "weight": into_bytes(codes.flatten(), high_first=True)[:, None],
        "weight.absmax": largest,
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    dense = (torch.tensor(NF4)[codes] * largest[:, None]).view(weight.shape)
    return stored, dense, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def int8(weight: Tensor) -> tuple[Stored, Tensor, Settings]:
    maxima = weight.float().abs().amax(1)
    codes = (weight.float() / maxima[:, None] * 127).round().to(torch.int8)
    stored = {"weight": codes, "SCB": maxima, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return stored, codes * maxima[:, None] * (1 / 127), {"load_in_8bit": True}


def fp8_block(weight: Tensor, high: int = 16, wide: int = 16) -> tuple[Stored, Tensor, Settings]:
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    each = torch.empty(rows, columns)
    for down in range(len(scales)):
        for right in range(scales.shape[1]):
            block = slice(down * high, (down + 1) * high), slice(right * wide, (right + 1) * wide)
            scales[down, right] = weight[block].float().abs().amax() / 448
            each[block] = scales[down, right]
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": [high, wide], "modules_to_not_convert": ["lm_head"]}
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * each, settings


def fp8_channel(weight: Tensor) -> tuple[Stored, Tensor, Settings]:
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales, {"quant_method": "fbgemm_fp8"}


def fp8_tensor(weight: Tensor) -> tuple[Stored, Tensor, Settings]:
    scale = weight.float().abs().amax() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(())}
    return stored, codes.float() * scale, {"quant_method": "modelopt", "quant_algo": "FP8"}


def gptq(
    weight: Tensor, bits: int = 4, group: int = 16, *, ordered: bool = False, newer: bool = False
) -> tuple[Stored, Tensor, Settings]:
    """`ordered`: groups are no neighbours (desc_act). Works on the transposed weight, as GPTQ stores it."""
    turned = weight.float().t()  # (in, out)
    index = torch.arange(len(turned)) // group
    if ordered:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    low, top = (
        torch.stack([getattr(turned[index == one], name)(0) for one in range(int(index.max()) + 1)])
        for name in ("amin", "amax")
    )
    scales = ((top - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    codes = (turned / scales.float()[index] + zeros[index]).round().clamp(0, 2**bits - 1)
    stored = {
        "qweight": into_words(codes.t(), bits).t(),
        "qzeros": into_words(zeros - (0 if newer else 1), bits),
        "scales": scales,
        "g_idx": index.int(),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered}
    settings |= {"checkpoint_format": "gptq_v2"} if newer else {}
    return stored, ((codes - zeros[index]) * scales.float()[index]).t(), settings


def awq(weight: Tensor, group: int = 16) -> tuple[Stored, Tensor, Settings]:
    turned = weight.float().t()
    grouped = turned.view(-1, group, turned.shape[1])
    low, top = grouped.amin(1), grouped.amax(1)
    scales = ((top - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    each, base = scales.float().repeat_interleave(group, 0), zeros.repeat_interleave(group, 0)
    codes = (turned / each + base).round().clamp(0, 15)
    places = (torch.arange(turned.shape[1] // 8)[:, None] * 8 + torch.tensor(AWQ_ORDER)).flatten()
    stored = {"qweight": into_words(codes[:, places], 4), "qzeros": into_words(zeros[:, places], 4), "scales": scales}
    return stored, ((codes - base) * each).t(), {"quant_method": "awq", "bits": 4, "version": "gemm"}


def packed(weight: Tensor, group: int = 16) -> tuple[Stored, Tensor, Settings]:
    """compressed-tensors' int4."""
    grouped = weight.float().view(len(weight), -1, group)
    scales = (grouped.abs().amax(-1) / 7).bfloat16()
    codes = (grouped / scales.float()[..., None]).round().clamp(-8, 7)
    stored = {
        "weight_packed": into_words(codes.view(weight.shape) + 8, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    return stored, (codes * scales.float()[..., None]).view(weight.shape), settings


def nvfp4(weight: Tensor) -> tuple[Stored, Tensor, Settings]:
    """ModelOpt's NVFP4."""
    grouped = weight.float().view(len(weight), -1, 16)
    whole = grouped.abs().amax() / (6 * 448)
    scales = (grouped.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    each = (scales.float() * whole)[..., None]
    codes = nearest(grouped / each, E2M1)
    stored = {
        "weight": into_bytes(codes.flatten(1), high_first=False),
        "weight_scale": scales,
        "weight_scale_2": whole,
        "input_scale": torch.ones(()),
    }
    dense = (torch.tensor(E2M1)[codes] * each).view(weight.shape)
    return stored, dense, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


FORMATS: dict[str, Callable[[Tensor], tuple[Stored, Tensor, Settings]]] = {
    "nf4": nf4,
    "int8": int8,
    "fp8 block": fp8_block,
    "fp8 channel": fp8_channel,
    "fp8 tensor": fp8_tensor,
    "gptq": gptq,
    "gptq ordered": lambda weight: gptq(weight, ordered=True),
    "gptq v2": lambda weight: gptq(weight, newer=True),
    "gptq 8 bits": lambda weight: gptq(weight, bits=8),
    "gptq 2 bits": lambda weight: gptq(weight, bits=2),
    "awq": awq,
    "packed": packed,
    "nvfp4": nvfp4,
}
