"""Towers of SigLIP: Gemma 3, Idefics 3 and SmolVLM, LFM2-VL, Command A Vision."""

from __future__ import annotations

import re
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import string, u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import (
    ALWAYS_F16,
    ALWAYS_F32,
    RuleResult,
    TowerTensor,
    blocks,
    flat_patches,
    make_mmproj,
)
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
_RESIZE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers of resampling filters
_LFM2_IMAGE_SIZE = 256  # the converter's: images have any size


@mmproj("Gemma3ForConditionalGeneration")
def gemma3(model: MultimodalModel) -> GGUFModelSpec:
    keys = vision_keys(model) | projector_type("gemma3")
    keys |= layer_norm_eps(model.vision.get("layer_norm_eps", 1e-6)) | activation("gelu")
    per_side = int(model.processor.get("image_seq_length", 256) ** 0.5)
    factor = find(model.vision, "image_size") // find(model.vision, "patch_size") // per_side
    if factor > 0 and factor != 4:
        keys["clip.vision.projector.scale_factor"] = u32(factor)
    return make_mmproj(
        model,
        keys,
        shifted_norm,
        prefixes=("multi_modal_projector.", "vision_tower.", "multimodal_projector.", "vision_model."),
        required=("v.patch_embd", "mm.input_projection", *blocks(layer_count(model.vision), *_BLOCK)),
        rename=_gemma_name,
        drop=("vision_model.head.",),
        fixed_types={"input_projection": ALWAYS_F16, ".embeddings.": ALWAYS_F32},
    )


@mmproj("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
def idefics3(model: MultimodalModel) -> GGUFModelSpec:
    keys = vision_keys(model) | projector_type("idefics3")
    keys |= layer_norm_eps(model.vision.get("layer_norm_eps", 1e-5))
    keys["clip.vision.projector.scale_factor"] = u32(model.config.get("scale_factor", 2))
    keys |= activation("gelu")
    longest = (model.processor.get("size") or {}).get("longest_edge", find(model.vision, "image_size"))
    keys["clip.vision.preproc_image_size"] = u32(longest)
    return make_mmproj(
        model,
        keys,
        prefixes=("model.vision_model.", "model.connector.", "model.vision_tower."),
        required=("v.patch_embd", "mm.model.fc", *blocks(layer_count(model.vision), *_BLOCK)),
        fixed_types={".embeddings.": ALWAYS_F32},
    )


@mmproj("Lfm2VlForConditionalGeneration")
def lfm2_vl(model: MultimodalModel) -> GGUFModelSpec:
    model = model.with_vision(image_size=_LFM2_IMAGE_SIZE)
    keys = vision_keys(model) | projector_type("lfm2") | layer_norm_eps(find(model.vision, "layer_norm_eps"))
    keys["clip.vision.projector.scale_factor"] = u32(model.config.get("downsample_factor", 2))
    keys |= activation("gelu")
    last = model.config.get("vision_feature_layer", -1)
    keys["clip.vision.block_count"] = u32(layer_count(model.vision) + last + 1)
    if (resample := model.processor.get("resample")) is not None:
        keys["clip.vision.image_resize_algo"] = string(_resize_algorithm(resample))
    return make_mmproj(
        model,
        keys,
        flat_patches("patch_embedding.weight"),
        prefixes=("multi_modal_projector.", "vision_tower."),
        required=("v.patch_embd", "mm.1", "mm.2", *blocks(layer_count(model.vision), *_BLOCK)),
        rename=siglip_name,
    )


@mmproj("Cohere2VisionForConditionalGeneration")
def cohere2_vision(model: MultimodalModel) -> GGUFModelSpec:
    keys = vision_keys(model) | projector_type("cohere2v") | layer_norm_eps(find(model.vision, "layer_norm_eps"))
    keys["clip.vision.projector.scale_factor"] = u32(model.config.get("downsample_factor", 2))
    keys["clip.vision.preproc_max_tiles"] = u32(model.setting("max_patches"))
    keys |= activation("gelu")
    return make_mmproj(
        model,
        keys,
        two_layers,
        prefixes=("vision_tower.", "multi_modal_projector."),
        required=("v.patch_embd", "mm.1", "mm.2", *blocks(layer_count(model.vision), *_BLOCK)),
        rename=siglip_name,
        fixed_types={".embeddings.": ALWAYS_F32},
    )


def shifted_norm(stored: TowerTensor) -> RuleResult:
    """Gemma's norm of the projector: llama.cpp has its weights plus one."""
    return (stored.tensor(add=1.0),) if stored.name.endswith("soft_emb_norm.weight") else None


def two_layers(stored: TowerTensor) -> RuleResult:
    """Command A Vision's projector, whose names gguf-py knows only since 0.20."""
    found = re.search(r"multi_modal_projector\.linear_([12])\.(weight|bias)$", stored.name)
    return (stored.tensor(f"mm.{found[1]}.{found[2]}"),) if found else None


def siglip_name(name: str) -> str:
    """The name in checkpoints of transformers 4: SigLIP is `vision_model` within the tower."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def _gemma_name(name: str) -> str:
    return siglip_name(name).replace("_weight", ".weight")


def _resize_algorithm(number: Any) -> str:
    if number not in _RESIZE:
        raise SourceError(f"preprocessor_config.json: llama.cpp cannot resize images with PIL's filter {number}")
    return _RESIZE[number]
