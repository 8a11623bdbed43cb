"""DeepSeek-MoE, V2 to V3.2, Kimi and Youtu: latent attention and experts; deepseek2 ignores prediction layers."""

from __future__ import annotations

import re
from dataclasses import replace

from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import NO_SCALING, hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import (
    PredictionLayers,
    prediction_layer_keys,
    prediction_layers,
)
from mergeforge.gguf.architectures.row_order import deinterleave_qkv
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, boolean, f32, u32

_NEEDS = (
    "attn_norm",
    "attn_q|attn_q_b",
    "attn_kv_a_mqa",
    "attn_kv_a_norm",
    "attn_k_b",
    "attn_v_b",
    "attn_output",
    "ffn_norm",
    "ffn_gate|ffn_gate_exps",
    "ffn_up|ffn_up_exps",
    "ffn_down|ffn_down_exps",
)


@architecture("DeepseekForCausalLM")
def deepseek(model: HFModel) -> GGUFModelSpec:
    """DeepSeek-MoE."""
    keys = hparams(model) | {
        "rope.dimension_count": u32(model.head_dim),
        **NO_SCALING,
        "leading_dense_block_count": u32(model.require("first_k_dense_replace")),
        "vocab_size": u32(model.require("vocab_size")),
        "expert_feed_forward_length": u32(model.require("moe_intermediate_size")),
        "expert_weights_scale": f32(1.0),
        "expert_count": u32(model.require("n_routed_experts")),
        "expert_shared_count": u32(model.require("n_shared_experts")),
    }
    return make_spec(model, "deepseek", keys, permute_rope_heads, stacked_experts, vocab="spm_or_gpt2")


@architecture(
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "KimiK25ForConditionalGeneration",
    "KimiVLForConditionalGeneration",
    "YoutuForCausalLM",
    "YoutuVLForConditionalGeneration",
)
def deepseek2(model: HFModel) -> GGUFModelSpec:
    notes = []
    if model.name == "DeepseekV3ForCausalLM" and model.find("scoring_func") is None:
        text = "config.json has no scoring_func: llama.cpp uses softmax for the experts, but DeepSeek V3 needs sigmoid"
        notes.append(WarningText(text))
    rules = (tied_head, unused_layers, stacked_experts, decompression)
    return make_spec(model, "deepseek2", _keys(model), *rules, vocab="gpt2", required_per_block=_NEEDS, notes=notes)


@architecture("DeepseekV32ForCausalLM")
def deepseek32(model: HFModel) -> GGUFModelSpec:
    """DeepSeek V3.2: an indexer selects the tokens that are attended to."""
    extra = prediction_layers(model, shift=0.0)
    stated = model.find("num_nextn_predict_layers") is not None
    keys = prediction_layer_keys(extra.count, always=stated) | indexer_keys(model)
    return latent_attention_spec(model, "gpt2", extra, "deepseek32", keys, names_of="glm-dsa")


def indexer_keys(model: HFModel) -> dict[str, Value]:
    return {
        "attention.indexer.head_count": u32(model.require("index_n_heads")),
        "attention.indexer.key_length": u32(model.require("index_head_dim")),
        "attention.indexer.top_k": u32(model.require("index_topk")),
    }


def latent_attention_spec(
    model: HFModel,
    vocab: str,
    extra: PredictionLayers,
    arch: str = "deepseek2",
    more: dict[str, Value] | None = None,
    names_of: str = "",
) -> GGUFModelSpec:
    """The spec of a model with DeepSeek's latent attention that keeps its prediction layers."""
    keys = _keys(model) | {"block_count": u32(model.layers + extra.count)} | prediction_layer_keys(extra.count)
    keys |= more or {}
    return make_spec(
        model,
        arch,
        keys,
        tied_head,
        extra.rule,
        stacked_experts,
        decompression,
        vocab=vocab,
        required_per_block=_NEEDS,
        layers=model.layers + extra.count,
        names_of=names_of,
        notes=extra.notes,
    )


def _keys(model: HFModel) -> dict[str, Value]:
    # llama.cpp computes latent attention as if all heads shared one key and value
    shared = {**model.config, "num_key_value_heads": 1, "rms_norm_eps": model.config.get("rms_norm_eps", 1e-6)}
    rotated, latent = model.require("qk_rope_head_dim"), model.config.get("kv_lora_rank", 512)
    keys = hparams(replace(model, config=shared)) | {
        "leading_dense_block_count": u32(_dense_layers(model)),
        "vocab_size": u32(model.require("vocab_size")),
    }
    keys |= optional(u32, attention__q_lora_rank=model.find("q_lora_rank"))
    keys |= {
        "attention.kv_lora_rank": u32(latent),
        "attention.key_length": u32(latent + rotated),
        "attention.value_length": u32(latent),
        "attention.key_length_mla": u32(model.require("qk_nope_head_dim") + rotated),
        "attention.value_length_mla": u32(model.require("v_head_dim")),
    }
    return keys | _expert_keys(model) | {"rope.dimension_count": u32(rotated)} | _log_multiplier(model)


def _dense_layers(model: HFModel) -> int:
    if (dense := model.find("first_k_dense_replace")) is not None:
        return int(dense)
    return 0 if model.find("n_routed_experts") is not None else model.layers


def _expert_keys(model: HFModel) -> dict[str, Value]:
    keys = {"expert_feed_forward_length": u32(model.require("moe_intermediate_size", "intermediate_size"))}
    keys |= optional(u32, expert_count=model.find("n_routed_experts"))
    keys["expert_shared_count"] = u32(model.find("n_shared_experts") or 0)
    keys |= optional(f32, expert_weights_scale=model.find("routed_scaling_factor"))
    return keys | ({"expert_weights_norm": boolean(True)} if model.find("norm_topk_prob") else {})


def _log_multiplier(model: HFModel) -> dict[str, Value]:
    """A tenth of mscale_all_dim: only deepseek2 scales it so, for compatibility with old files."""
    scale = model.rope.get("mscale_all_dim")
    return {} if scale is None else {"rope.scaling.yarn_log_multiplier": f32(0.1 * scale)}


def tied_head(stored: HFTensor) -> RuleResult:
    tied = stored.model.find("tie_word_embeddings") and stored.name.endswith("lm_head.weight")
    return "tied to the embedding" if tied else None


def unused_layers(stored: HFTensor) -> RuleResult:
    found = re.match(r"model\.layers\.(\d+)\.", stored.name)
    if found and int(found[1]) >= stored.model.layers:
        return "a multi-token prediction layer, which llama.cpp's deepseek2 does not have"
    return None


def decompression(stored: HFTensor) -> RuleResult:
    """kv_b_proj: the key part of each head is transposed, the value part is as stored."""
    if not stored.name.endswith("kv_b_proj.weight"):
        return None
    model = stored.model
    heads, key, value = model.kv_heads, int(model.require("qk_nope_head_dim")), int(model.require("v_head_dim"))
    expected = heads * (key + value)
    if stored.info.rows != expected:
        raise SourceError(
            f"{stored.info.name}: {stored.info.rows} rows, but {heads} heads of {key} + {value} need {expected}",
            hint="config.json and weights do not match",
        )
    rank = stored.info.columns
    keys, values = deinterleave_qkv(stored.info.rows, heads, (key, value))
    return (
        stored.block_tensor("attn_k_b", (heads, rank, key), rows=keys, transpose=key),
        stored.block_tensor("attn_v_b", (heads, value, rank), rows=values),
    )
