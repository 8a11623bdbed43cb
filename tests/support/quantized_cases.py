"""Every quantization format by hand: the stored tensors of a weight, and their values by one dense formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from mergeforge.quant_codecs.fp4 import E2M1
from mergeforge.quant_codecs.nf4 import NF4

Tensor = torch.Tensor
Stored = dict[str, Tensor]  # by the name after the module
Settings = dict[str, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word's 4-bit fields, from the lowest


def nearest(values: Tensor, levels: Any) -> Tensor:
    """The indices of the nearest levels."""
    return (values.float().unsqueeze(-1) - torch.tensor(levels)).abs().argmin(-1)


def into_words(codes: Tensor, bits: int) -> Tensor:
    """Pack (rows, n) codes, 32 / bits per int32 word, the first in the lowest bits."""
    fields = codes.long().view(len(codes), -1, 32 // bits) << (torch.arange(32 // bits) * bits)
    words = fields.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def into_bytes(codes: Tensor, *, high_first: bool) -> Tensor:
    """Pack pairs of 4-bit codes as bytes."""
    first, second = codes[..., ::2], codes[..., 1::2]
    return (first * 16 + second if high_first else first + second * 16).to(torch.uint8)


def nf4(weight: Tensor) -> tuple[Stored, Tensor, Settings]:
    flat = weight.float().view(-1, 64)
    absmax = flat.abs().amax(1)
    codes = nearest(flat / absmax[:, None], NF4)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {
        "weight": into_bytes(codes.flatten(), high_first=True)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    dense = (torch.tensor(NF4)[codes] * absmax[:, None]).view(weight.shape)
    return stored, dense, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def int8(weight: Tensor) -> tuple[Stored, Tensor, Settings]:
    maxima = weight.float().abs().amax(1)
    codes = (weight.float() / maxima[:, None] * 127).round().to(torch.int8)
    stored = {"weight": codes, "SCB": maxima, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return stored, codes * maxima[:, None] * (1 / 127), {"load_in_8bit": True}


def fp8_block(weight: Tensor, height: int = 16, width: int = 16) -> tuple[Stored, Tensor, Settings]:
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // height), -(-columns // width))
    scale_of = torch.empty(rows, columns)
    for down in range(len(scales)):
        for right in range(scales.shape[1]):
            block = slice(down * height, (down + 1) * height), slice(right * width, (right + 1) * width)
            scales[down, right] = weight[block].float().abs().amax() / 448
            scale_of[block] = scales[down, right]
    codes = (weight.float() / scale_of).to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": [height, width], "modules_to_not_convert": ["lm_head"]}
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * scale_of, settings


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
    weight: Tensor, bits: int = 4, group: int = 16, *, ordered: bool = False, v2: bool = False
) -> tuple[Stored, Tensor, Settings]:
    """GPTQ, which stores the weight transposed; `ordered`: the inputs of a group are not adjacent (desc_act)."""
    transposed = weight.float().t()  # (in, out)
    index = torch.arange(len(transposed)) // group
    if ordered:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    low, top = (
        torch.stack([getattr(transposed[index == number], name)(0) for number in range(int(index.max()) + 1)])
        for name in ("amin", "amax")
    )
    scales = ((top - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    codes = (transposed / scales.float()[index] + zeros[index]).round().clamp(0, 2**bits - 1)
    stored = {
        "qweight": into_words(codes.t(), bits).t(),
        "qzeros": into_words(zeros - (0 if v2 else 1), bits),
        "scales": scales,
        "g_idx": index.int(),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered}
    settings |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    return stored, ((codes - zeros[index]) * scales.float()[index]).t(), settings


def awq(weight: Tensor, group: int = 16) -> tuple[Stored, Tensor, Settings]:
    transposed = weight.float().t()
    grouped = transposed.view(-1, group, transposed.shape[1])
    low, top = grouped.amin(1), grouped.amax(1)
    scales = ((top - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    scale_of, zero_of = scales.float().repeat_interleave(group, 0), zeros.repeat_interleave(group, 0)
    codes = (transposed / scale_of + zero_of).round().clamp(0, 15)
    order = (torch.arange(transposed.shape[1] // 8)[:, None] * 8 + torch.tensor(AWQ_ORDER)).flatten()
    stored = {"qweight": into_words(codes[:, order], 4), "qzeros": into_words(zeros[:, order], 4), "scales": scales}
    return stored, ((codes - zero_of) * scale_of).t(), {"quant_method": "awq", "bits": 4, "version": "gemm"}


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
    global_scale = grouped.abs().amax() / (6 * 448)
    scales = (grouped.abs().amax(-1) / 6 / global_scale).to(torch.float8_e4m3fn)
    scale_of = (scales.float() * global_scale)[..., None]
    codes = nearest(grouped / scale_of, E2M1)
    stored = {
        "weight": into_bytes(codes.flatten(1), high_first=False),
        "weight_scale": scales,
        "weight_scale_2": global_scale,
        "input_scale": torch.ones(()),
    }
    dense = (torch.tensor(E2M1)[codes] * scale_of).view(weight.shape)
    return stored, dense, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


FORMATS: dict[str, Callable[[Tensor], tuple[Stored, Tensor, Settings]]] = {
    "nf4": nf4,
    "int8": int8,
    "fp8 block": fp8_block,
    "fp8 channel": fp8_channel,
    "fp8 tensor": fp8_tensor,
    "gptq": gptq,
    "gptq ordered": lambda weight: gptq(weight, ordered=True),
    "gptq v2": lambda weight: gptq(weight, v2=True),
    "gptq 8 bits": lambda weight: gptq(weight, bits=8),
    "gptq 2 bits": lambda weight: gptq(weight, bits=2),
    "awq": awq,
    "packed": packed,
    "nvfp4": nvfp4,
}
