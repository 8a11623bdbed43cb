"""MiMo V2: sliding windows with key-value heads of their own, attention sinks, and layers that predict tokens."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.tensor_mapping import GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, f32, u32


@architecture("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM")
def mimo2(model: HFModel) -> GGUFModelSpec:
    """The converter takes three prediction layers for granted; here they are counted."""
    extra = prediction_layers(model, "mtp.", shift=0.0)
    keys = hparams(model) | {"block_count": u32(model.layers + extra.count)} | _attention_keys(model, extra.count)
    keys |= {
        "expert_count": u32(model.require("n_routed_experts")),
        "expert_feed_forward_length": u32(model.require("moe_intermediate_size")),
        "rope.dimension_count": u32(int(model.head_dim * model.full_rope["partial_rotary_factor"])),
        "attention.layer_norm_rms_epsilon": f32(model.find("layernorm_epsilon") or 1e-5),
    }
    keys |= optional(f32, attention__value_scale=model.find("attention_value_scale"))
    return make_spec(
        model,
        "mimo2",
        keys | prediction_layer_keys(extra.count),
        extra.rule,
        unnamed,
        stacked_experts,
        vocab="gpt2",
        required_per_block=GATED,
        layers=model.layers + extra.count,
        rename=lambda name: _sink_name(extra.rename(name)),
        notes=extra.notes,
        stacked_order=("gate", "up", "down"),
    )


def _attention_keys(model: HFModel, extra_layers: int) -> dict[str, Value]:
    """Prediction layers have a sliding window."""
    slides = [*model.require("hybrid_layer_pattern"), *[1] * extra_layers]
    full, sliding = model.kv_heads, int(model.require("swa_num_key_value_heads"))
    return {
        "attention.head_count_kv": array("i32", [sliding if one == 1 else full for one in slides]),
        "attention.sliding_window": u32(model.require("sliding_window")),
        "attention.sliding_window_pattern": array("i32", slides),
        "attention.value_length": u32(model.require("v_head_dim")),
    }


def _sink_name(name: str) -> str:
    return f"{name}.weight" if "attention_sink" in name and not name.endswith(".weight") else name


def unnamed(stored: HFTensor) -> RuleResult:
    """Tensors that gguf 0.19 has no names for."""
    if stored.name.endswith(".self_attn.qkv_proj.weight"):
        return (stored.block_tensor("attn_qkv"),)
    return (stored.block_tensor("layer_output_norm"),) if stored.name.endswith(".final_layernorm.weight") else None
