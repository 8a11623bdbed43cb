"""FP8 output: which tensors are stored so, what the file holds of them, and what config.json says.

As DeepSeek-V3 and Qwen3-FP8 are stored, and transformers' finegrained_fp8, vLLM and SGLang read them: linear
weights in E4M3, with a float32 scale for each block of 128 x 128. Embeddings, heads, norms, routers and stacks of
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
from mergeforge.writers.fp8 import SCALES, FP8Encoder, stored_as
from mergeforge.writers.safetensors import SafetensorsEncoder

BLOCK = (128, 128)
_KEPT = ("gate", "router", "score", "classifier", "norm", "proj_out")  # a router's gate; gate_proj is another word
_TABLES = ("wpe", "shared", "relative_attention_bias")  # embeddings whose names do not say so


def fp8_names(infos: Mapping[str, TensorInfo]) -> list[str]:
    """The tensors that are stored as FP8."""
    return [name for name, info in infos.items() if _is_linear(name, info)]


def _is_linear(name: str, info: TensorInfo) -> bool:
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    is_table = "embed" in last or last in (*EMBEDDINGS, *_TABLES)
    is_matrix = leaf == "weight" and len(info.shape) == 2 and info.is_float
    return is_matrix and not is_table and last not in (*HEADS, *_KEPT)


def stored_infos(infos: Mapping[str, TensorInfo], fp8: bool) -> list[TensorInfo]:
    """What the checkpoint's files hold: with FP8 each weight's codes, and its scales behind them."""
    packed = set(fp8_names(infos)) if fp8 else set()
    return [one for name, info in infos.items() for one in (stored_as(info, BLOCK) if name in packed else (info,))]


def checkpoint_outlets(infos: Mapping[str, TensorInfo], layout: Layout) -> dict[str, list[TensorEncoder]]:
    """What takes each tensor in the checkpoint's files, in their order."""
    outlets: dict[str, list[TensorEncoder]] = {}
    for name, extent in layout.extents.items():
        if name not in infos:
            continue  # the scales of a tensor: its second outlet
        scales = layout.extents.get(f"{name}{SCALES}") if f"{name}{SCALES}" not in infos else None
        if scales is None:
            outlets[name] = [SafetensorsEncoder(infos[name], extent)]
        else:
            info = infos[name]
            outlets[name] = [FP8Encoder(info, extent, BLOCK), FP8Encoder(info, scales, BLOCK, scales=True)]
    return outlets


def quantization_config(infos: Mapping[str, TensorInfo], model_type: str | None) -> dict[str, Any]:
    """What config.json says of them. Raises SourceError for models whose weights stand as (in, out)."""
    if model_type in CONV1D_MODELS:
        what = f"output.fp8: {model_type} stores its weights transposed, which FP8's loaders do not read"
        raise SourceError(what, hint="take fp8 out")
    packed = set(fp8_names(infos))
    matrices = [name for name, info in infos.items() if len(info.shape) == 2 and name.endswith(".weight")]
    kept = sorted(name.removesuffix(".weight") for name in matrices if name not in packed)
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": kept,
    }
