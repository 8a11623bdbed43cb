"""Models with experts, one tensor each, that differ from Qwen's only in keys: dots.llm1, SmallThinker, GroveMoE,
LLaDA-MoE, AFMoE (Trinity)."""

from __future__ import annotations

import re

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.bailing_moe import expert_bias_name
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.llama import llama_keys
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.qwen import expert_keys
from mergeforge.gguf.architectures.tensor_mapping import DECODER, GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, boolean, f32, u32

_SOFTMAX, _SIGMOID = 1, 2
_NORMED = (*GATED, "attn_q_norm", "attn_k_norm")
_CHUNK = re.compile(r"\.chunk_experts\.(\d+)\.(gate|down|up)_proj\.weight$")


@architecture("Dots1ForCausalLM")
def dots1(model: HFModel) -> GGUFModelSpec:
    keys = expert_keys(model) | {
        "leading_dense_block_count": u32(model.require("first_k_dense_replace")),
        "expert_shared_count": u32(model.require("n_shared_experts")),
        "expert_weights_scale": f32(model.require("routed_scaling_factor")),
        "expert_weights_norm": boolean(model.require("norm_topk_prob")),
    }
    return make_spec(model, "dots1", keys, stacked_experts, vocab="gpt2", required_per_block=_NORMED)


@architecture("AfmoeForCausalLM")
def afmoe(model: HFModel) -> GGUFModelSpec:
    keys = llama_keys(model) | optional(
        u32,
        expert_shared_count=model.find("num_shared_experts"),
        expert_feed_forward_length=model.find("moe_intermediate_size"),
        leading_dense_block_count=model.find("num_dense_layers"),
    )
    keys |= optional(boolean, expert_weights_norm=model.find("route_norm"))
    keys |= optional(f32, expert_weights_scale=model.find("route_scale"))
    keys |= optional(u32, attention__sliding_window=model.find("sliding_window"))
    return make_spec(
        model,
        "afmoe",
        keys,
        stacked_experts,
        vocab="llama",
        required_per_block=DECODER,
        rename=expert_bias_name,
        stacked_order=("gate", "up", "down"),
    )


@architecture("SmallThinkerForCausalLM")
def smallthinker(model: HFModel) -> GGUFModelSpec:
    size = model.find("moe_ffn_hidden_size")
    keys = hparams(model) | optional(
        u32,
        expert_count=model.find("moe_num_primary_experts"),
        expert_used_count=model.find("moe_num_active_primary_experts"),
        expert_feed_forward_length=size,
        feed_forward_length=size,
    )
    keys["expert_gating_func"] = u32(_SOFTMAX if model.find("moe_primary_router_apply_softmax") else _SIGMOID)
    if any(model.find("sliding_window_layout") or ()) and model.find("sliding_window_size"):
        keys["attention.sliding_window"] = u32(model.require("sliding_window_size"))
    return make_spec(model, "smallthinker", keys, _primary_experts, vocab="gpt2")


@architecture("GroveMoeForCausalLM", "modeling_grove_moe.GroveMoeForCausalLM")
def grovemoe(model: HFModel) -> GGUFModelSpec:
    """Pairs of experts share a smaller one. The converter has fixed numbers of modeling_grove_moe.py."""
    keys = hparams(model) | optional(u32, expert_feed_forward_length=model.find("moe_intermediate_size"))
    keys |= {
        "expert_chunk_feed_forward_length": u32(model.find("head_dim") or 128),
        "experts_per_group": u32(2),
        "expert_group_scale": f32(0.05),
    }
    return make_spec(
        model,
        "grovemoe",
        keys,
        _unused_bias,
        shared_by_pairs,
        stacked_experts,
        vocab="gpt2",
        required_per_block=_NORMED,
    )


@architecture("LLaDAMoEModel", "LLaDAMoEModelLM")
def llada_moe(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | optional(u32, expert_feed_forward_length=model.find("expert_intermediate_size"))
    keys |= diffusion_keys(156895)
    return make_spec(model, "llada-moe", keys, stacked_experts, vocab="gpt2", required_per_block=_NORMED)


def diffusion_keys(mask: int | None) -> dict[str, Value]:
    """Of models that fill in masks: attention in both directions, logits not shifted."""
    return optional(u32, **{"tokenizer.ggml.mask_token_id": mask}) | {
        "attention.causal": boolean(False),
        "diffusion.shift_logits": boolean(False),
    }


def _primary_experts(stored: HFTensor) -> RuleResult:
    found = re.search(r"\.experts\.(\d+)\.(gate|down|up)\.weight$", stored.name)
    if not found:
        return None
    return _slice(stored, int(found[1]), f"ffn_{found[2]}_exps", stored.model.require("moe_num_primary_experts"))


def shared_by_pairs(stored: HFTensor) -> RuleResult:
    found = _CHUNK.search(stored.name)
    return _slice(stored, int(found[1]), f"ffn_{found[2]}_chexps", stored.model.experts // 2) if found else None


def _unused_bias(stored: HFTensor) -> RuleResult:
    return "not used by GroveMoE" if stored.name.endswith(".expert_bias") else None


def _slice(stored: HFTensor, expert: int, part: str, count: int) -> RuleResult:
    shape = (int(count), *stored.info.shape)
    return (stored.block_tensor(part, shape, first_row=expert * stored.info.rows),)
