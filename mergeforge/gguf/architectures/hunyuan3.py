"""Hunyuan 3 (hy_v3): a sigmoid router, shared experts, and layers that predict tokens."""

from __future__ import annotations

import re

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.tensor_mapping import GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import boolean, f32, u32

_SIGMOID = 2


@architecture("HYV3ForCausalLM")
def hy_v3(model: HFModel) -> GGUFModelSpec:
    extra = prediction_layers(model, shift=0.0)
    width, shared = int(model.require("moe_intermediate_size")), model.find("num_shared_experts")
    norm, scale = model.find("route_norm"), model.find("router_scaling_factor")
    keys = hparams(model) | {
        "block_count": u32(model.layers + extra.count),
        "expert_feed_forward_length": u32(width),
        "expert_shared_feed_forward_length": u32(width * (1 if shared is None else int(shared))),
        "expert_weights_norm": boolean(True if norm is None else norm),
        "expert_weights_scale": f32(1.0 if scale is None else scale),
        "expert_gating_func": u32(_SIGMOID),
    }
    return make_spec(
        model,
        "hy_v3",
        keys | prediction_layer_keys(extra.count),
        extra.rule,
        selection_bias,
        stacked_experts,
        vocab="gpt2",
        required_per_block=(*GATED, "attn_q_norm", "attn_k_norm"),
        layers=model.layers + extra.count,
        names_of="dots1",
        rename=lambda name: _name(name, model.layers),
        notes=extra.notes,
    )


def _name(name: str, layers: int) -> str:
    """A prediction layer's last norm is called shared_head.norm; the rest as in DeepSeek and dots.llm1."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    if found and int(found[1]) >= layers:
        name = name.replace(".final_layernorm.", ".shared_head.norm.")
    return name.replace(".mlp.router.gate.", ".mlp.gate.").replace(".mlp.shared_mlp.", ".mlp.shared_experts.")


def selection_bias(stored: HFTensor) -> RuleResult:
    """llama.cpp's hy_v3 reads the bias of expert selection without the ending `.bias`."""
    if not stored.name.endswith(".mlp.expert_bias"):
        return None
    return (stored.tensor(f"blk.{stored.layer}.exp_probs_b"),)
