"""InternVL's tower, in OpenGVLab's layout and in that of transformers."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.key_values import u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import blocks, make_mmproj, split_qkv
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
_PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
_PREFIX = "model.multi_modal_projector."
_WITHOUT_ENDING = (".ls", ".lambda_", "position_embedding")


@mmproj("InternVisionModel")
def internvl(model: MultimodalModel) -> GGUFModelSpec:
    for key in ("image_size", "patch_size"):
        if isinstance(size := model.vision.get(key), list):
            model = model.with_vision(**{key: size[0]})
    keys = vision_keys(model) | projector_type("internvl") | layer_norm_eps(find(model.vision, "layer_norm_eps"))
    keys |= activation(find(model.vision, "hidden_act"))
    keys["clip.vision.projector.scale_factor"] = u32(int(1.0 / find(model.config, "downsample_ratio")))
    for bound in ("min", "max"):
        if tiles := model.config.get(f"{bound}_dynamic_patch", 0):
            keys[f"clip.vision.preproc_{bound}_tiles"] = u32(tiles)
    return make_mmproj(
        model,
        keys,
        split_qkv(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), fused="attn.qkv"),
        prefixes=("vision_tower.", "mlp", "model.vision_tower", "model.multi_modal_projector"),
        required=("v.patch_embd", "mm.model.mlp.1", *blocks(layer_count(model.vision), *_BLOCK)),
        rename=_name,
    )


def _name(name: str) -> str:
    if name.startswith(("vision_tower.", "multi_modal_projector.")):
        name = f"model.{name}"
    if name.startswith(_PREFIX):
        part, _, kind = name.removeprefix(_PREFIX).partition(".")
        name = f"{_PROJECTOR.get(part, part)}.{kind}"
    if name.startswith("vision_model"):
        name = f"vision_tower.{name}"
    needs_ending = any(part in name for part in _WITHOUT_ENDING) and not name.endswith(".weight")
    return f"{name}.weight" if needs_ending else name
