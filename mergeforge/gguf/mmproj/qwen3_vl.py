"""The towers of Qwen 3-VL, Qwen 3.5 and GLM-4V."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import array, u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import RuleResult, TowerTensor, blocks, make_mmproj, split_temporal_patches
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find
from mergeforge.gguf.mmproj.qwen_vl import without_model

_MERGER = {"linear_fc1": "mm.0", "linear_fc2": "mm.2", "norm": "v.post_ln"}
_DEEPSTACK = {"linear_fc1": "fc1", "linear_fc2": "fc2", "norm": "norm"}
_BLOCK = ("attn_qkv", "attn_out", "ffn_up", "ffn_down")


@mmproj(
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
def qwen3_vl(model: MultimodalModel) -> GGUFModelSpec:
    model = model.with_vision(image_size=_image_size(model))
    vision, layers = model.vision, layer_count(model.vision)
    keys = vision_keys(model) | projector_type("qwen3vl_merger") | activation("gelu")
    if vision.get("spatial_merge_size") is not None:
        keys["clip.vision.spatial_merge_size"] = u32(vision["spatial_merge_size"])
    keys |= layer_norm_eps((model.config.get("text_config") or {}).get("rms_norm_eps", 1e-6))
    deepstack = vision.get("deepstack_visual_indexes") or ()
    if layers:
        flags = [layer in deepstack for layer in range(layers)]
        keys["clip.vision.is_deepstack_layers"] = array("bool", flags)
    return make_mmproj(
        model,
        keys,
        deepstack_merger,
        merger,
        split_temporal_patches,
        prefixes=("visual.",),
        required=("v.patch_embd", "mm.0", "mm.2", *blocks(layers, *_BLOCK)),
        rename=without_model,
    )


@mmproj("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "GlmOcrForConditionalGeneration")
def glm4v(model: MultimodalModel) -> GGUFModelSpec:
    keys = vision_keys(model) | projector_type("glm4v")
    if (name := str(model.vision.get("hidden_act", "")).lower()) in ("gelu", "silu"):
        keys |= activation(name)
    keys |= layer_norm_eps(model.vision.get("rms_norm_eps", 1e-5))
    return make_mmproj(
        model,
        keys,
        split_temporal_patches,
        prefixes=("visual.",),
        required=("v.patch_embd", *blocks(layer_count(model.vision), *_BLOCK, "ffn_gate")),
        rename=without_model,
    )


def merger(stored: TowerTensor) -> RuleResult:
    """The projector: two layers, and the norm before them."""
    if not stored.name.startswith("visual.merger."):
        return None
    _, _, part, kind = stored.name.split(".")
    return (stored.tensor(f"{_MERGER[part]}.{kind}"),)


def deepstack_merger(stored: TowerTensor) -> RuleResult:
    """The projectors of layers whose features are added to the text model's; they are numbered by layer."""
    if not stored.name.startswith("visual.deepstack_merger_list."):
        return None
    _, _, number, part, kind = stored.name.split(".")
    layer = find(stored.model.vision, "deepstack_visual_indexes")[int(number)]
    return (stored.tensor(f"v.deepstack.{layer}.{_DEEPSTACK[part]}.{kind}"),)


def _image_size(model: MultimodalModel) -> int:
    """The size of the images whose patches have the learned positions, as the converter computes it."""
    if model.vision.get("image_size") is not None:
        return int(model.vision["image_size"])
    positions = model.vision.get("num_position_embeddings", 2304)
    return int(positions**0.5 * model.vision.get("patch_size", 16))
