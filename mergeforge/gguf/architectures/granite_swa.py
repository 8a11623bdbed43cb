"""Granite with sliding windows and attention sinks: dense, or with experts whose gate and up stay in one tensor."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.constants import rope_freq_factors_llama3
from mergeforge.gguf.architectures.granite import scaled_keys, without_head_dim
from mergeforge.gguf.architectures.hparams import optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import array, u32

_FUSED = {
    "block_sparse_moe.experts.gate_up_proj": "ffn_gate_up_exps",
    "block_sparse_moe.input_linear.weight": "ffn_gate_up_exps",
    "block_sparse_moe.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.output_linear.weight": "ffn_down_exps",
    "block_sparse_moe.router.weight": "ffn_gate_inp",
    "shared_mlp.input_linear.weight": "ffn_up_shexp",
    "shared_mlp.output_linear.weight": "ffn_down_shexp",
}
_WITH_EXPERTS = (*ATTENTION, "ffn_norm", "ffn_gate_inp", "ffn_gate_up_exps", "ffn_down_exps")


@architecture("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM")
def granite_swa(model: HFModel) -> GGUFModelSpec:
    has_experts = model.name == "GraniteMoeSWAForCausalLM"
    keys = scaled_keys(model) | {
        "attention.sliding_window": u32(model.find("sliding_window") or 128),
        "attention.sliding_window_pattern": array("bool", _sliding(model)),
    }
    if ropes := model.find("no_rope_layers"):
        keys["attention.rope_pattern"] = array("bool", [bool(one) for one in ropes])
    if has_experts:
        keys |= optional(u32, expert_shared_feed_forward_length=model.find("shared_intermediate_size") or None)
    return make_spec(
        model,
        "granite_swa",
        keys,
        permute_rope_heads,
        _own_tensors,
        vocab="llama",
        required_per_block=_WITH_EXPERTS if has_experts and model.experts else GATED,
        constants=rope_freq_factors_llama3(without_head_dim(model)),
        names_of="llama",
    )


def _sliding(model: HFModel) -> list[bool]:
    """Which layers have a sliding window; without layer_types, all but every fourth."""
    if kinds := model.find("layer_types"):
        return [kind == "sliding_attention" for kind in kinds]
    return [at % 4 != 0 for at in range(model.layers)]


def _own_tensors(stored: HFTensor) -> RuleResult:
    """Sinks, and experts whose tensors keep gate and up together."""
    if stored.name.endswith("self_attn.sinks"):
        return (stored.block_tensor("attn_sinks"),)
    part = next((part for ending, part in _FUSED.items() if stored.name.endswith(ending)), None)
    return (stored.block_tensor(part),) if part else None
