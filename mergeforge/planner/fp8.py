"""FP8 output: which tensors are stored as FP8, what the files hold for them, and what config.json says.

The format is that of DeepSeek-V3 and Qwen3-FP8, which transformers' finegrained_fp8, vLLM and SGLang read: linear
weights in E4M3, with a float32 scale for each block of 128 x 128. Embeddings, heads, norms, routers and stacked
experts stay in 16 bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError
from mergeforge.io.file_layout import Layout
from mergeforge.writers.encoder import TensorEncoder
from mergeforge.writers.fp8 import SCALE_SUFFIX, FP8Encoder, stored_tensors
from mergeforge.writers.safetensors import SafetensorsEncoder

BLOCK = (128, 128)
_KEPT = ("gate", "router", "score", "classifier", "norm", "proj_out")  # `gate` is a router; gate_proj is not matched
_TABLES = ("wpe", "shared", "relative_attention_bias")  # embeddings whose names do not contain "embed"


def fp8_names(infos: Mapping[str, TensorInfo]) -> list[str]:
    """The names of the tensors that are stored as FP8."""
    return [name for name, info in infos.items() if _is_linear(name, info)]


def _is_linear(name: str, info: TensorInfo) -> bool:
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    is_table = "embed" in last or last in (*EMBEDDINGS, *_TABLES)
    is_matrix = leaf == "weight" and len(info.shape) == 2 and info.is_float
    return is_matrix and not is_table and last not in (*HEADS, *_KEPT)


def stored_infos(infos: Mapping[str, TensorInfo], fp8: bool) -> list[TensorInfo]:
    """The tensors of the safetensors files: with FP8, each weight's codes, followed by its scales."""
    packed = set(fp8_names(infos)) if fp8 else set()
    stored = (stored_tensors(info, BLOCK) if name in packed else (info,) for name, info in infos.items())
    return [part for parts in stored for part in parts]


def checkpoint_encoders(infos: Mapping[str, TensorInfo], layout: Layout) -> dict[str, list[TensorEncoder]]:
    """The encoders that write each tensor to the safetensors files, in the order of the files."""
    encoders: dict[str, list[TensorEncoder]] = {}
    for name, extent in layout.extents.items():
        if name not in infos:
            continue  # the scales of a tensor, which its second encoder writes
        scales = layout.extents.get(f"{name}{SCALE_SUFFIX}") if f"{name}{SCALE_SUFFIX}" not in infos else None
        if scales is None:
            encoders[name] = [SafetensorsEncoder(infos[name], extent)]
        else:
            info = infos[name]
            encoders[name] = [FP8Encoder(info, extent, BLOCK), FP8Encoder(info, scales, BLOCK, scales=True)]
    return encoders


def quantization_config(infos: Mapping[str, TensorInfo], model_type: str | None) -> dict[str, Any]:
    """config.json's `quantization_config`. Raises SourceError for models that store weights as (in, out)."""
    if model_type in CONV1D_MODELS:
        text = f"output.fp8: {model_type} stores its weights transposed, and no loader reads these as FP8"
        raise SourceError(text, hint="remove output.fp8")
    packed = set(fp8_names(infos))
    matrices = [name for name, info in infos.items() if len(info.shape) == 2 and name.endswith(".weight")]
    not_converted = sorted(name.removesuffix(".weight") for name in matrices if name not in packed)
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": not_converted,
    }
