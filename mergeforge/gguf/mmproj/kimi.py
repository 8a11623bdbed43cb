"""MoonViT: the vision towers of Kimi-VL, Kimi K2.5 and GLM-5V."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import boolean, u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import RuleResult, TowerTensor, blocks, make_mmproj, split_qkv
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel

_KIMI_VL_SIDE = 64  # patches; the converter's
_MIN_PATCHES = 8  # the converter's
_PARTS = ("vision_tower.", "multi_modal_projector.", "mm_projector.")


@mmproj("KimiVLForConditionalGeneration")
def kimi_vl(model: MultimodalModel) -> GGUFModelSpec:
    model = model.with_vision(image_size=_KIMI_VL_SIDE * 14)
    keys = vision_keys(model) | projector_type("kimivl") | activation("gelu")
    keys["clip.vision.projector.scale_factor"] = u32(2)
    keys |= layer_norm_eps(model.vision.get("layer_norm_eps", 1e-5))
    return make_mmproj(
        model,
        keys,
        split_qkv(("wq", "wk", "wv"), fused="wqkv"),
        flat_positions,
        prefixes=_PARTS,
        required=("v.patch_embd", "mm.1", "mm.2", *blocks(layer_count(model.vision), "attn_q", "attn_out", "ffn_up")),
    )


@mmproj("KimiK25ForConditionalGeneration", "Glm5vForConditionalGeneration")
def kimi_k25(model: MultimodalModel) -> GGUFModelSpec:
    patch, height = model.vision.get("patch_size", 14), model.vision.get("init_pos_emb_height", 64)
    model = model.with_vision(image_size=height * patch)
    vision = model.vision
    keys = vision_keys(model) | projector_type("kimik25")
    keys["vision.pos_emb_height"] = u32(height)
    keys["vision.pos_emb_width"] = u32(vision.get("init_pos_emb_width", 64))
    keys["vision.pos_emb_time"] = u32(vision.get("init_pos_emb_time", 4))
    keys["clip.use_gelu"] = boolean(vision.get("projector_hidden_act", "gelu") == "gelu")
    keys |= layer_norm_eps(vision.get("projector_ln_eps", 1e-5))
    keys["clip.vision.projector.scale_factor"] = u32(vision.get("merge_kernel_size", [2, 2])[0])
    keys["clip.vision.image_min_pixels"] = u32(_MIN_PATCHES * patch**2)
    keys["clip.vision.image_max_pixels"] = u32(model.processor.get("in_patch_limit", 16384) * patch**2)
    return make_mmproj(
        model,
        keys,
        rotated_qkv,
        prefixes=_PARTS,
        required=("v.patch_embd", "mm.1", "mm.2", *blocks(layer_count(vision), "attn_qkv", "attn_out", "ffn_up")),
        rename=_name,
        drop=("pos_emb.time_weight",),
    )


def flat_positions(stored: TowerTensor) -> RuleResult:
    """Learned positions by row and column, as one list."""
    if not stored.name.endswith("pos_emb.weight"):
        return None
    height, width, size = stored.info.shape
    return (stored.tensor(shape=(height * width, size)),)


def rotated_qkv(stored: TowerTensor) -> RuleResult:
    """q, k and v in one tensor; in q and k, the pairs of rows that are rotated by height and by width are set apart."""
    import numpy as np

    if "wqkv" not in stored.name:
        return None
    heads, size = int(stored.model.vision.get("num_attention_heads", 16)), stored.info.shape[0] // 3
    numbers = np.arange(size, dtype=np.int64).reshape(heads, -1, 2, 2)
    rotated = numbers.transpose(0, 2, 1, 3).reshape(-1)
    values = np.arange(2 * size, 3 * size, dtype=np.int64)
    return (stored.tensor(rows=np.concatenate([rotated, size + rotated, values])),)


def _name(name: str) -> str:
    name = name.replace("mm_projector.proj.0.", "mm_projector.proj.linear_1.")
    name = name.replace("mm_projector.proj.2.", "mm_projector.proj.linear_2.")
    if name.startswith("mm_projector.linear_"):
        name = name.replace("mm_projector.linear_", "mm_projector.proj.linear_", 1)
    return name
