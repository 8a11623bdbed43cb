"""Kimi Linear: DeepSeek's latent attention in some layers, Kimi delta attention in the others."""

from __future__ import annotations

from dataclasses import replace

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.deepseek import decompression
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.state_space import decay
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, f32, u32

_CONVOLUTIONS = (".q_conv1d.weight", ".k_conv1d.weight", ".v_conv1d.weight")
_NEEDS = (
    *("attn_norm", "attn_q|attn_q_b", "attn_k_b|ssm_conv1d_k", "attn_v_b|ssm_conv1d_v", "attn_output", "ffn_norm"),
    *("ffn_gate|ffn_gate_exps", "ffn_up|ffn_up_exps", "ffn_down|ffn_down_exps"),
)


@architecture("KimiLinearForCausalLM", "KimiLinearModel")
def kimi_linear(model: HFModel) -> GGUFModelSpec:
    return make_spec(
        model,
        "kimi-linear",
        _keys(model),
        decay,
        convolutions,
        stacked_experts,
        decompression,
        vocab="gpt2",
        required_per_block=_NEEDS,
        rename=lambda name: f"{name.removesuffix('.dt_bias')}.dt_proj.bias" if name.endswith(".dt_bias") else name,
        stacked_order=("gate", "down", "up"),
    )


def _keys(model: HFModel) -> dict[str, Value]:
    # llama.cpp computes latent attention as if all heads shared one key and value
    linear = model.require("linear_attn_config")
    shared = replace(model, config={**model.config, "num_key_value_heads": 1})
    attends = [int(layer + 1 in linear["full_attn_layers"]) for layer in range(model.layers)]
    keys = hparams(shared) | {"vocab_size": u32(model.require("vocab_size"))}
    keys |= {"attention.head_count_kv": array("i32", attends)}
    keys |= optional(u32, ssm__conv_kernel=linear.get("short_conv_kernel_size"), kda__head_dim=linear.get("head_dim"))
    return (
        keys
        | _latent_keys(model)
        | {
            "expert_feed_forward_length": u32(model.require("moe_intermediate_size")),
            "expert_shared_count": u32(model.require("num_shared_experts")),
            "leading_dense_block_count": u32(model.require("first_k_dense_replace")),
            "expert_weights_scale": f32(model.require("routed_scaling_factor")),
        }
    )


def _latent_keys(model: HFModel) -> dict[str, Value]:
    rotated, latent = int(model.require("qk_rope_head_dim")), int(model.require("kv_lora_rank"))
    return {
        **optional(u32, attention__q_lora_rank=model.find("q_lora_rank")),
        "attention.kv_lora_rank": u32(latent),
        "rope.dimension_count": u32(rotated),
        "attention.key_length": u32(latent + rotated),
        "attention.key_length_mla": u32(int(model.require("qk_nope_head_dim")) + rotated),
        "attention.value_length_mla": u32(model.require("v_head_dim")),
    }


def convolutions(stored: HFTensor) -> RuleResult:
    """Those of queries, keys and values, each as a four-dimensional tensor."""
    if not stored.name.endswith(_CONVOLUTIONS):
        return None
    return (stored.tensor(shape=(1, stored.info.shape[0], 1, stored.info.shape[-1])),)
