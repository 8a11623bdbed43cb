"""The names of a CLIP text encoder's modules in Hugging Face's classes, for checkpoints in OpenCLIP's layout.

OpenCLIP fuses q, k and v in one parameter (Stable Diffusion 2, and the second encoder of SDXL).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mergeforge.adapters.peft.hf_renames import LoadedSlice
from mergeforge.tensors.lazy import LazyTensor

_INSIDE = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_OUTSIDE = {"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm"}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_FUSED = "attn.in_proj_weight"


def clip_aliases(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[LoadedSlice, ...]]:
    """Hugging Face's module -> the rows of stored weights that it is. `tensors`: by name within the encoder."""
    aliases: dict[str, tuple[LoadedSlice, ...]] = {}
    for name, tensor in tensors.items():
        rows = tensor.info.shape[0] if tensor.info.shape else 1
        match = _LAYER.fullmatch(name.removesuffix(".weight"))
        if match is None:
            module = _OUTSIDE.get(name.removesuffix(".weight"))
            aliases |= {module: (LoadedSlice(tensor.info.name, rows),)} if module else {}
            continue
        layer = f"text_model.encoder.layers.{match[1]}"
        if match[2] == _FUSED:
            for at, which in enumerate("qkv"):
                piece = LoadedSlice(tensor.info.name, rows // 3, stored_start=at * (rows // 3))
                aliases[f"{layer}.self_attn.{which}_proj"] = (piece,)
        elif match[2] in _INSIDE and name.endswith(".weight"):
            aliases[f"{layer}.{_INSIDE[match[2]]}"] = (LoadedSlice(tensor.info.name, rows),)
    return aliases
