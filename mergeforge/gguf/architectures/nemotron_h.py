"""Nemotron-H and Nemotron 3: each layer is a Mamba 2, an attention or a feed-forward, which may have experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.granite import scaled_keys
from mergeforge.gguf.architectures.hparams import head_sizes, layer_counts, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.state_space import columns_of_one, convolution, grouped_norm, mamba2_name
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, Rule, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, boolean, f32, u32

_CONTEXT = 1 << 20  # as in the converter: without rope there is no limit
_ATTENTION = ("*", "attention", "full_attention")
_EXPERTS = ("E", "moe")
_NEEDS = ("attn_norm", "ssm_in|attn_q|ffn_up|ffn_up_exps", "ssm_out|attn_output|ffn_down|ffn_down_exps")
_PREDICTION_PARTS = ("enorm", "hnorm", "eh_proj")


@architecture("NemotronHForCausalLM")
def nemotron_h(model: HFModel) -> GGUFModelSpec:
    """Nemotron 3 has experts, and a prediction head of two layers, which become one block."""
    kinds = list(model.find("hybrid_override_pattern") or model.require("layers_block_type"))
    model = replace(model, config={**model.config, "num_hidden_layers": len(kinds)})
    if model.find("num_experts_per_tok") is None:
        width = int(model.require("intermediate_size", "n_inner", "hidden_dim"))
        return _spec(model, "nemotron_h", _keys(model, kinds, 0) | _widths(kinds, ("-", "mlp"), width))
    extra = prediction_layers(model, "mtp.", shift=0.0)
    count = 1 if extra.count and model.find("num_nextn_predict_layers") else 0
    keys = _keys(model, kinds, count) | _expert_keys(model, kinds + ["E"] * count) | prediction_layer_keys(count)
    rules = (extra.rule, prediction_head) if count else (unused_head_layers,)
    return _spec(model, "nemotron_h_moe", keys, *rules, extra_layers=count, notes=extra.notes)


@architecture("NemotronHPuzzleForCausalLM")
def nemotron_h_puzzle(model: HFModel) -> GGUFModelSpec:
    """Nemotron pruned by NVIDIA's Puzzle: the number and width of experts differ by layer."""
    blocks: Sequence[Mapping[str, Any]] = model.require("block_configs")
    model = replace(model, config={**model.config, "num_hidden_layers": len(blocks)})
    keys = _keys(model, [block["block_type"] for block in blocks], 0)
    widths = [block.get("moe_intermediate_size") or 0 for block in blocks]
    keys |= layer_counts("feed_forward_length", widths) | layer_counts("expert_feed_forward_length", widths)
    keys |= layer_counts("expert_used_count", [block.get("num_experts_per_tok") or 0 for block in blocks])
    keys |= _shared_expert_keys(model) | {"moe_latent_size": u32(model.require("moe_latent_size"))}
    return _spec(model, "nemotron_h_moe", keys, unused_head_layers)


def _spec(
    model: HFModel, arch: str, keys: Mapping[str, Value], *rules: Rule, extra_layers: int = 0, notes: Sequence[str] = ()
) -> GGUFModelSpec:
    return make_spec(
        model,
        arch,
        keys,
        *rules,
        permute_rope_heads,
        stacked_experts,
        columns_of_one,
        grouped_norm(int(model.require("n_groups", "mamba_n_groups")), ".mixer.norm.weight"),
        convolution,
        vocab="gpt2",
        required_per_block=_NEEDS,
        layers=model.layers + extra_layers,
        rename=lambda name: _name(name, model.layers),
        notes=notes,
    )


def _keys(model: HFModel, kinds: Sequence[str], extra_layers: int) -> dict[str, Value]:
    head_size = model.require("head_dim", "attention_head_dim")
    heads = int(model.require("mamba_num_heads", "mamba_n_heads"))
    attends = [kind in _ATTENTION for kind in kinds] + [True] * extra_layers
    keys = scaled_keys(model) | {"block_count": u32(model.layers + extra_layers)}
    keys |= {
        "ssm.conv_kernel": u32(model.require("conv_kernel", "d_conv", "mamba_d_conv")),
        "ssm.state_size": u32(model.require("ssm_state_size", "state_size", "mamba_d_state")),
        "ssm.group_count": u32(model.require("n_groups", "mamba_n_groups")),
        "ssm.inner_size": u32(heads * int(model.require("mamba_head_dim", "mamba_d_head"))),
        "ssm.time_step_rank": u32(heads),
    }
    keys |= layer_counts("attention.head_count_kv", [model.kv_heads if one else 0 for one in attends])
    keys |= {"rope.scaling.finetuned": boolean(False), "context_length": u32(_CONTEXT)}
    return keys | head_sizes(int(head_size))


def _expert_keys(model: HFModel, kinds: Sequence[str]) -> dict[str, Value]:
    width = int(model.require("moe_intermediate_size"))
    keys = _widths(kinds, _EXPERTS, width) | {"expert_used_count": u32(model.require("num_experts_per_tok"))}
    keys |= {"expert_feed_forward_length": u32(width)} | _shared_expert_keys(model)
    return keys | optional(u32, moe_latent_size=model.find("moe_latent_size"))


def _shared_expert_keys(model: HFModel) -> dict[str, Value]:
    return {
        "expert_shared_feed_forward_length": u32(model.require("moe_shared_expert_intermediate_size")),
        "expert_count": u32(model.require("n_routed_experts")),
        "expert_shared_count": u32(model.require("n_shared_experts")),
        "expert_weights_norm": boolean(model.require("norm_topk_prob")),
        "expert_weights_scale": f32(model.require("routed_scaling_factor")),
        "expert_group_count": u32(model.require("n_group")),
    }


def _widths(kinds: Sequence[str], feed_forward: tuple[str, ...], width: int) -> dict[str, Value]:
    return layer_counts("feed_forward_length", [width if kind in feed_forward else 0 for kind in kinds])


def _name(name: str, layers: int) -> str:
    """`model.` is `backbone.` in gguf-py's name map; both layers of the prediction head become the last block."""
    if found := re.match(r"mtp\.layers\.([01])\.(.+)$", name):
        return _prediction_name(int(found[1]), found[2], layers)
    return mamba2_name(re.sub(r"^model\.", "backbone.", name))


def _prediction_name(layer: int, name: str, layers: int) -> str:
    if layer == 0 and name.startswith(_PREDICTION_PARTS):
        return f"model.layers.{layers}.{name}"
    if layer == 1 and name == "final_layernorm.weight":
        return f"model.layers.{layers}.shared_head.norm.weight"
    if layer == 1 and name == "norm.weight":
        return f"model.layers.{layers}.post_attention_layernorm.weight"
    return f"backbone.layers.{layers}.{name}"


def prediction_head(stored: HFTensor) -> RuleResult:
    """The norm between attention and experts, which gguf 0.19 has no name for; a router with the file's type."""
    if stored.name.endswith(".post_attention_layernorm.weight"):
        return (stored.block_tensor("post_attention_norm"),)
    router = stored.info.name.startswith("mtp.") and stored.name.endswith(".mixer.gate.weight")
    return (replace(stored.tensor(), f32=False),) if router else None


def unused_head_layers(stored: HFTensor) -> RuleResult:
    mtp = stored.info.name.startswith("mtp.")
    return "a multi-token prediction layer, which llama.cpp does not have for this model" if mtp else None
