"""Llama 4's vision tower."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import RuleResult, TowerTensor, blocks, make_mmproj
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")


@mmproj("Llama4ForConditionalGeneration")
def llama4(model: MultimodalModel) -> GGUFModelSpec:
    if model.vision.get("hidden_act") != "gelu":
        raise SourceError(f"config.json: llama.cpp's Llama 4 tower has gelu, not {model.vision.get('hidden_act')}")
    keys = vision_keys(model) | projector_type("llama4") | layer_norm_eps(find(model.vision, "norm_eps"))
    keys["clip.vision.projector.scale_factor"] = u32(int(1.0 / find(model.vision, "pixel_shuffle_ratio")))
    keys |= activation("gelu")
    return make_mmproj(
        model,
        keys,
        single_projection,
        prefixes=("multi_modal_projector.", "vision_model."),
        required=("v.patch_embd", "mm.model.fc", *blocks(layer_count(model.vision), *_BLOCK)),
        rename=_name,
    )


def single_projection(stored: TowerTensor) -> RuleResult:
    """The projector is one layer, although its name has a number."""
    return (stored.tensor("mm.model.fc.weight"),) if "multi_modal_projector.linear_1" in stored.name else None


def _name(name: str) -> str:
    name = name.removeprefix("model.")
    return f"{name}.weight" if "positional_embedding_vlm" in name and ".weight" not in name else name
