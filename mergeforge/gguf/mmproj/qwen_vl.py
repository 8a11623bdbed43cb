"""The towers of Qwen 2-VL, 2.5-VL and EXAONE 4.5."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import Value, u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import blocks, make_mmproj, split_qkv, split_temporal_patches
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_IMAGE_SIZE = 560  # the converter's: images have any size


@mmproj("Qwen2VLModel", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
def qwen2_vl(model: MultimodalModel) -> GGUFModelSpec:
    model = qwen_vision(model)
    keys = vision_keys(model)
    if model.config.get("model_type") == "qwen2_vl":
        keys |= projector_type("qwen2vl_merger")
    else:
        keys |= projector_type("qwen2.5vl_merger") | activation("silu") | window_pattern(model)
    keys |= layer_norm_eps(model.config.get("rms_norm_eps", 1e-6))
    return make_mmproj(
        model,
        keys,
        split_qkv(("q", "k", "v")),
        split_temporal_patches,
        prefixes=("visual.",),
        required=("v.patch_embd", "mm.0", "mm.2", *blocks(layer_count(model.vision), "attn_q", "attn_out", "ffn_up")),
        rename=without_model,
    )


@mmproj("Exaone4_5_ForConditionalGeneration")
def exaone4_5(model: MultimodalModel) -> GGUFModelSpec:
    model = qwen_vision(model)
    vision = model.vision
    keys = vision_keys(model) | projector_type("exaone4_5") | activation("silu")
    keys["clip.vision.image_min_pixels"] = u32(model.setting("min_pixels"))
    keys["clip.vision.image_max_pixels"] = u32(model.setting("max_pixels"))
    if vision.get("num_key_value_heads") is not None:
        keys["clip.vision.attention.head_count_kv"] = u32(vision["num_key_value_heads"])
    keys |= layer_norm_eps(vision.get("rms_norm_eps", model.config.get("rms_norm_eps", 1e-6)))
    if vision.get("window_size") is not None:
        keys["clip.vision.window_size"] = u32(vision["window_size"])
    if vision.get("fullatt_block_indexes"):
        keys |= window_pattern(model)
    return make_mmproj(
        model,
        keys,
        split_temporal_patches,
        prefixes=("visual.",),
        required=("v.patch_embd", *blocks(layer_count(vision), "attn_qkv", "attn_out", "ffn_up")),
        rename=without_model,
    )


def qwen_vision(model: MultimodalModel) -> MultimodalModel:
    """The model with the converter's image size, and the sizes of Qwen 2-VL under their usual names."""
    vision = model.vision
    sizes = {"image_size": vision.get("image_size", _IMAGE_SIZE)}
    if "embed_dim" in vision:
        sizes |= {"intermediate_size": vision["hidden_size"], "hidden_size": vision["embed_dim"]}
    return model.with_vision(**sizes)


def window_pattern(model: MultimodalModel) -> dict[str, Value]:
    """Every how many layers attention is not limited to windows."""
    full: Sequence[int] = find(model.vision, "fullatt_block_indexes")
    period = full[0] + 1
    if any(later - earlier != period for earlier, later in pairwise(full)):
        text = f"config.json: fullatt_block_indexes {list(full)} are not at equal distances, as llama.cpp needs them"
        raise SourceError(text, hint="copy it from the base model")
    return {"clip.vision.n_wa_pattern": u32(period)}


def without_model(name: str) -> str:
    """`model.visual.` is `visual.`, as the towers are named since transformers 4.52."""
    return name.removeprefix("model.") if name.startswith("model.visual.") else name
