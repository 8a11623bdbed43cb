"""The vision tower of Hunyuan VL."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import F16_IN_F16, RuleResult, TowerTensor, blocks, make_mmproj
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel

_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
_PROJECTOR = ("vit.perceive.proj.0.weight", "vit.perceive.proj.2.weight")


@mmproj("HunYuanVLForConditionalGeneration")
def hunyuan_vl(model: MultimodalModel) -> GGUFModelSpec:
    vision = model.vision
    model = model.with_vision(image_size=vision.get("image_size", vision.get("max_image_size", 2048)))
    keys = vision_keys(model) | projector_type("hunyuanvl") | activation("gelu")
    keys |= layer_norm_eps(vision.get("rms_norm_eps", 1e-5))
    keys["clip.vision.spatial_merge_size"] = u32(vision.get("spatial_merge_size", 2))
    keys["clip.vision.image_min_pixels"] = u32(model.setting("min_pixels"))
    keys["clip.vision.image_max_pixels"] = u32(model.setting("max_pixels"))
    return make_mmproj(
        model,
        keys,
        without_class_position,
        prefixes=("vit.",),
        required=("v.patch_embd", *blocks(layer_count(vision), *_BLOCK)),
        rename=lambda name: name.removeprefix("model."),
        fixed_types=dict.fromkeys(_PROJECTOR, F16_IN_F16),
    )


def without_class_position(stored: TowerTensor) -> RuleResult:
    """The positions of the patches, without that of the class token."""
    import numpy as np

    if "position_embedding" not in stored.name:
        return None
    count, columns = stored.info.shape
    return (stored.tensor(shape=(count - 1, columns), rows=np.arange(1, count, dtype=np.int64)),)
