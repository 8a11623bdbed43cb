"""Hunyuan: dense, with experts, and the text part of its vision model."""

from __future__ import annotations

from dataclasses import replace

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.deepseek import tied_head
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import NO_SCALING, hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import GATED, make_spec
from mergeforge.gguf.key_values import Value, array, f32, u32

_CONTEXT = 256 * 1024
_NORMED = (*GATED, "attn_q_norm", "attn_k_norm")


@architecture("HunYuanDenseV1ForCausalLM")
def hunyuan_dense(model: HFModel) -> GGUFModelSpec:
    keys = hparams(_without_experts(model)) | _dynamic_rope(model, model.head_dim, 50)
    return make_spec(model, "hunyuan-dense", keys, tied_head, vocab="hunyuan", required_per_block=_NORMED)


@architecture("HunYuanVLForConditionalGeneration")
def hunyuan_vl(model: HFModel) -> GGUFModelSpec:
    """Rope by sections (xdrope): the base is not scaled, but alpha is a key."""
    keys = hparams(_without_experts(model))
    rope = model.rope
    if rope.get("rope_type") in ("dynamic", "xdrope") and "mrope_section" in rope:
        context = int(model.require("max_position_embeddings"))
        keys |= {
            "rope.freq_base": f32(rope["rope_theta"]),
            **NO_SCALING,
            "rope.scaling.factor": f32(rope.get("factor", 1)),
            "rope.scaling.alpha": f32(rope["alpha"]),
            "rope.scaling.original_context_length": u32(context),
            "context_length": u32(context),
            "rope.dimension_sections": array("i32", rope["mrope_section"]),
        }
    return make_spec(model, "hunyuan_vl", keys, tied_head, vocab="hunyuan", required_per_block=_NORMED)


@architecture("HunYuanMoEV1ForCausalLM")
def hunyuan_moe(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {
        "expert_shared_feed_forward_length": u32(model.require("intermediate_size")),
        "expert_feed_forward_length": u32(_of_all_layers(model, "moe_intermediate_size")),
        "expert_used_count": u32(_of_all_layers(model, "moe_topk")),
        "expert_shared_count": u32(_of_all_layers(model, "num_shared_expert")),
    }
    keys |= _dynamic_rope(model, model.hidden // model.heads, 1000)
    return make_spec(
        model, "hunyuan-moe", keys, tied_head, stacked_experts, vocab="hunyuan_moe", required_per_block=_NORMED
    )


def _without_experts(model: HFModel) -> HFModel:
    """Dense models state one expert."""
    return replace(model, config={key: value for key, value in model.config.items() if key != "num_experts"})


def _of_all_layers(model: HFModel, key: str) -> int:
    """A value that may be listed for each layer, but must be the same in all."""
    stated = model.require(key)
    values = set(stated) if isinstance(stated, list) else {stated}
    if len(values) != 1:
        raise SourceError(f"config.json: llama.cpp needs one {key} for all layers, but there are {sorted(values)}")
    return int(values.pop())


def _dynamic_rope(model: HFModel, size: int, alpha: float) -> dict[str, Value]:
    """Dynamic scaling with a fixed alpha is another base frequency (transformers: HunYuan's rotary embedding)."""
    rope = model.rope
    if rope.get("rope_type") != "dynamic":
        return {}
    base = rope.get("rope_theta", 10000.0) * rope.get("alpha", alpha) ** (size / (size - 2))
    return {
        "rope.freq_base": f32(base),
        **NO_SCALING,
        "rope.scaling.factor": f32(1),
        "rope.scaling.original_context_length": u32(_CONTEXT),
        "context_length": u32(_CONTEXT),
    }
