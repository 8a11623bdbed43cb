"""Granite 3 and 4: Llama with four multipliers; with experts, gate and up in one tensor; with Mamba 2 layers."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.constants import rope_freq_factors_llama3
from mergeforge.gguf.architectures.experts import gate_up_halves, stacked_experts
from mergeforge.gguf.architectures.hparams import layer_counts, optional
from mergeforge.gguf.architectures.llama import llama_keys
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.state_space import columns_of_one, convolution, grouped_norm, mamba2_name
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, boolean, f32, u32

_FEED_FORWARD = ("ffn_norm", "ffn_gate|ffn_gate_exps", "ffn_up|ffn_up_exps", "ffn_down|ffn_down_exps")
_CONTEXT = 1 << 20  # as in the converter: without rope there is no limit
_NEEDS = (*ATTENTION, *_FEED_FORWARD)


@architecture("GraniteForCausalLM")
def granite(model: HFModel) -> GGUFModelSpec:
    return _granite(model, "granite", {})


@architecture("GraniteMoeHybridForCausalLM", "BambaForCausalLM")
def granite_hybrid(model: HFModel) -> GGUFModelSpec:
    """Granite 4: Mamba 2 layers among those with attention; without any it is a plain Granite."""
    attends = _attends(model)
    if all(attends):
        text = "config.json: a Granite 4 without Mamba layers cannot be written as GGUF yet"
        raise SourceError(text, hint="write safetensors")
    groups, inner = int(model.require("mamba_n_groups")), int(model.require("mamba_expand")) * model.hidden
    rope = model.name == "BambaForCausalLM"
    keys = scaled_keys(model) | optional(
        u32, expert_shared_feed_forward_length=model.find("shared_intermediate_size") or None
    )
    keys |= {
        "ssm.conv_kernel": u32(model.require("mamba_d_conv")),
        "ssm.state_size": u32(model.require("mamba_d_state")),
        "ssm.group_count": u32(groups),
        "ssm.inner_size": u32(inner),
        "ssm.time_step_rank": u32(model.require("mamba_n_heads")),
    }
    keys |= optional(u32, rope__dimension_count=model.find("attn_rotary_emb"))
    keys |= layer_counts("attention.head_count_kv", [model.kv_heads if one else 0 for one in attends])
    keys |= {"rope.scaling.finetuned": boolean(rope)} | ({} if rope else {"context_length": u32(_CONTEXT)})
    return make_spec(
        model,
        "granitehybrid",
        keys,
        permute_rope_heads,
        fused_feed_forward,
        stacked_experts,
        columns_of_one,
        grouped_norm(groups, ".mamba.norm.weight"),
        convolution,
        vocab="spm_or_gpt2",
        required_per_block=("attn_norm", "attn_q|ssm_in", "attn_output|ssm_out", "ffn_norm"),
        rename=mamba2_name,
    )


def _attends(model: HFModel) -> list[bool]:
    """Which layers have attention."""
    if kinds := model.find("layer_types"):
        return [kind in ("attention", "full_attention") for kind in kinds]
    if listed := model.find("attn_layer_indices"):
        return [at in listed for at in range(model.layers)]
    offset, period = int(model.require("attn_layer_offset")), int(model.require("attn_layer_period"))
    return [at % period == offset for at in range(model.layers)]


@architecture("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
def granitemoe(model: HFModel) -> GGUFModelSpec:
    shared = model.find("shared_intermediate_size") or None
    return _granite(model, "granitemoe", optional(u32, expert_shared_feed_forward_length=shared))


def _granite(model: HFModel, arch: str, more: dict[str, Value]) -> GGUFModelSpec:
    return make_spec(
        model,
        arch,
        scaled_keys(model) | more,
        permute_rope_heads,
        fused_feed_forward,
        stacked_experts,
        vocab="llama",
        required_per_block=_NEEDS,
        constants=rope_freq_factors_llama3(_without_head_dim(model)),
    )


def _without_head_dim(model: HFModel) -> HFModel:
    return HFModel(model.name, model.original_config, {**model.config, "head_dim": None}, model.tensors)


def scaled_keys(model: HFModel) -> dict[str, Value]:
    """Llama's keys and four multipliers. llama.cpp's granite has no head_dim key."""
    return llama_keys(_without_head_dim(model)) | optional(
        f32,
        attention__scale=model.find("attention_multiplier") or None,
        embedding_scale=model.find("embedding_multiplier") or None,
        residual_scale=model.find("residual_multiplier") or None,
        logit_scale=model.find("logits_scaling") or None,
    )


def fused_feed_forward(stored: HFTensor) -> RuleResult:
    """input_linear is gate and up, fused; without experts the shared feed-forward is the layer's only one."""
    if stored.name.endswith("block_sparse_moe.input_linear.weight"):
        return gate_up_halves(stored, "exps")
    ending = "shexp" if stored.model.experts else ""
    if stored.name.endswith("shared_mlp.input_linear.weight"):
        return gate_up_halves(stored, ending)
    if stored.name.endswith("shared_mlp.output_linear.weight") and not ending:
        return (stored.block_tensor("ffn_down"),)
    return None
