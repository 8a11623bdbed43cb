"""Ling 1 and 2 (Bailing) and Sarvam: experts, and q, k and v in one tensor."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.row_order import deinterleave_qkv, interleave_rope_halves
from mergeforge.gguf.architectures.tensor_mapping import DECODER, HFTensor, Rule, RuleResult, make_spec
from mergeforge.gguf.key_values import boolean, f32, u32


@architecture("BailingMoeForCausalLM")
def bailingmoe(model: HFModel) -> GGUFModelSpec:
    if model.find("norm_head"):
        raise SourceError("config.json: an output with normalized columns (norm_head) cannot be written as GGUF")
    keys = hparams(model) | {
        "rope.dimension_count": u32(model.head_dim),
        "leading_dense_block_count": u32(model.require("first_k_dense_replace")),
        "vocab_size": u32(model.require("vocab_size")),
        "expert_feed_forward_length": u32(model.require("moe_intermediate_size")),
        "expert_weights_scale": f32(1.0),
        "expert_shared_count": u32(model.require("num_shared_experts")),
        "expert_weights_norm": boolean(model.require("norm_topk_prob")),
    }
    return make_spec(model, "bailingmoe", keys, rotated_projections, stacked_experts, vocab="gpt2")


@architecture("BailingMoeV2ForCausalLM")
def bailingmoe2(model: HFModel) -> GGUFModelSpec:
    return _like_bailing2(model, int(model.head_dim * model.rope.get("partial_rotary_factor", 0.5)))


@architecture("SarvamMoEForCausalLM", "modeling_sarvam_moe.SarvamMoEForCausalLM")
def sarvam_moe(model: HFModel) -> GGUFModelSpec:
    """Ling 2 with whole heads rotated; the biases of expert selection are made to have the mean 0."""
    return _like_bailing2(model, model.head_dim, _centered_bias)


def _centered_bias(stored: HFTensor) -> RuleResult:
    is_bias = stored.name.endswith(".expert_bias.bias")
    return (stored.tensor(centered=True),) if is_bias else None


def _like_bailing2(model: HFModel, rotated: int, *rules: Rule) -> GGUFModelSpec:
    extra = prediction_layers(model, shift=0.0)
    size, shared = int(model.require("moe_intermediate_size")), int(model.require("num_shared_experts"))
    keys = hparams(model) | {
        "block_count": u32(model.layers + extra.count),
        "rope.dimension_count": u32(rotated),
        "leading_dense_block_count": u32(model.require("first_k_dense_replace")),
        "vocab_size": u32(model.require("vocab_size")),
        "expert_feed_forward_length": u32(size),
        "expert_shared_feed_forward_length": u32(model.find("moe_shared_expert_intermediate_size") or size * shared),
        "expert_weights_scale": f32(model.require("routed_scaling_factor")),
        "expert_shared_count": u32(shared),
        "expert_weights_norm": boolean(model.require("norm_topk_prob")),
    }
    if model.find("num_nextn_predict_layers") is not None:
        keys |= prediction_layer_keys(extra.count, always=True)
    return make_spec(
        model,
        "bailingmoe2",
        keys,
        extra.rule,
        *rules,
        stacked_experts,
        vocab="gpt2",
        required_per_block=DECODER,
        layers=model.layers + extra.count,
        rename=expert_bias_name,
        notes=extra.notes,
    )


def expert_bias_name(name: str) -> str:
    """The bias of expert selection, stored without `.bias`."""
    return f"{name}.bias" if name.endswith(".expert_bias") else name


def rotated_projections(stored: HFTensor) -> RuleResult:
    """query_key_value (all queries, keys, values) with rope halves interleaved; dense is the output projection."""
    if stored.name.endswith("attention.dense.weight"):
        return (stored.block_tensor("attn_output"),)
    if not stored.name.endswith("query_key_value.weight"):
        return None
    heads, groups = stored.model.heads, stored.model.kv_heads
    size = stored.rows_per_part(heads + 2 * groups)
    query, key, value = deinterleave_qkv(stored.info.rows, 1, (heads * size, groups * size, groups * size))
    columns = stored.info.columns
    return (
        stored.block_tensor("attn_q", (len(query), columns), rows=query[interleave_rope_halves(len(query), heads)]),
        stored.block_tensor("attn_k", (len(key), columns), rows=key[interleave_rope_halves(len(key), groups)]),
        stored.block_tensor("attn_v", (len(value), columns), rows=value),
    )
