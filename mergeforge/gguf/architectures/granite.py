"""Granite 3: Llama with four multipliers; with experts, gate and up in one tensor."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.constants import rope_freq_factors_llama3
from mergeforge.gguf.architectures.experts import gate_up_halves, stacked_experts
from mergeforge.gguf.architectures.hparams import optional
from mergeforge.gguf.architectures.llama import llama_keys
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, f32, u32

_FEED_FORWARD = ("ffn_norm", "ffn_gate|ffn_gate_exps", "ffn_up|ffn_up_exps", "ffn_down|ffn_down_exps")
_NEEDS = (*ATTENTION, *_FEED_FORWARD)


@architecture("GraniteForCausalLM")
def granite(model: HFModel) -> GGUFModelSpec:
    return _granite(model, "granite", {})


@architecture("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
def granitemoe(model: HFModel) -> GGUFModelSpec:
    shared = model.find("shared_intermediate_size") or None
    return _granite(model, "granitemoe", optional(u32, expert_shared_feed_forward_length=shared))


def _granite(model: HFModel, arch: str, more: dict[str, Value]) -> GGUFModelSpec:
    # llama.cpp's granite has no head_dim key
    model = HFModel(model.name, model.original_config, {**model.config, "head_dim": None}, model.tensors)
    scales = optional(
        f32,
        attention__scale=model.find("attention_multiplier") or None,
        embedding_scale=model.find("embedding_multiplier") or None,
        residual_scale=model.find("residual_multiplier") or None,
        logit_scale=model.find("logits_scaling") or None,
    )
    return make_spec(
        model,
        arch,
        llama_keys(model) | scales | more,
        permute_rope_heads,
        fused_feed_forward,
        stacked_experts,
        vocab="llama",
        required_per_block=_NEEDS,
        constants=rope_freq_factors_llama3(model),
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
