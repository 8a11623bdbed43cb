"""Pixtral's tower: LLaVA with Pixtral, Mistral Small 3.1 and later, LightOnOCR."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec
from mergeforge.gguf.architectures.row_order import interleave_rope_halves
from mergeforge.gguf.key_values import u32
from mergeforge.gguf.mmproj import mmproj
from mergeforge.gguf.mmproj.keys import activation, layer_count, layer_norm_eps, projector_type, vision_keys
from mergeforge.gguf.mmproj.mmproj_spec import Rule, RuleResult, TowerTensor, blocks, make_mmproj
from mergeforge.gguf.mmproj.multimodal_model import MultimodalModel, find

_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_gate", "ffn_down")
_PARTS = ("multi_modal_projector.", "vision_tower.", "patch_merger.", "pre_mm_projector_norm")
_EPS = 1e-5  # hard-coded in transformers' modeling_pixtral.py


@mmproj("LlavaForConditionalGeneration", "Mistral3ForConditionalGeneration")
def pixtral(model: MultimodalModel) -> GGUFModelSpec:
    return _pixtral(model, "pixtral", break_id=model.token_id("[IMG_BREAK]"))


@mmproj("LightOnOCRForConditionalGeneration")
def lighton_ocr(model: MultimodalModel) -> GGUFModelSpec:
    return _pixtral(model, "lightonocr", break_id=-1)


def _pixtral(model: MultimodalModel, projector: str, break_id: int) -> GGUFModelSpec:
    if model.vision.get("model_type") != "pixtral":
        kind = model.vision.get("model_type")
        raise SourceError(
            f"config.json: llama.cpp's converter writes {model.name} with a Pixtral tower, not with {kind}"
        )
    keys = vision_keys(model) | projector_type("pixtral") | layer_norm_eps(model.vision.get("layer_norm_eps", _EPS))
    keys |= activation(find(model.vision, "hidden_act"))
    if "spatial_merge_size" in model.config:
        keys["clip.vision.spatial_merge_size"] = u32(model.config["spatial_merge_size"])
    keys |= projector_type(projector)
    return make_mmproj(
        model,
        keys,
        break_embedding(break_id),
        rotated_heads,
        prefixes=(*_PARTS, *(("model.embed_tokens.", "embed_tokens.") if break_id > 0 else ())),
        required=("v.patch_embd", "mm.1", *blocks(layer_count(model.vision), *_BLOCK)),
        rename=_name,
    )


def break_embedding(number: int) -> Rule:
    """A rule for the embedding: llama.cpp puts that of [IMG_BREAK] at the end of every row of patches."""

    def rule(stored: TowerTensor) -> RuleResult:
        import numpy as np

        if not stored.name.endswith("embed_tokens.weight"):
            return None
        if number >= stored.info.rows:
            raise SourceError(f"{stored.info.name}: no row {number} for the token [IMG_BREAK]")
        rows = np.array([number], dtype=np.int64)
        return (stored.tensor("v.token_embd.img_break", (stored.info.columns,), rows=rows),)

    return rule


def rotated_heads(stored: TowerTensor) -> RuleResult:
    """Queries and keys, with the two halves of each head interleaved."""
    if not stored.name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return None
    heads = int(find(stored.model.vision, "num_attention_heads"))
    return (stored.tensor(rows=interleave_rope_halves(stored.info.rows, heads)),)


def _name(name: str) -> str:
    name = name.replace("model.vision_encoder.", "vision_tower.").replace("model.vision_projection.", _PARTS[0])
    name = name.removeprefix("model.") if name.startswith(tuple(f"model.{part}" for part in _PARTS)) else name
    return name.replace("language_model.", "")
