"""Grok 1 and 2: softcaps, experts, and in Grok 2 a dense feed-forward beside them."""

from __future__ import annotations

import re

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, make_spec
from mergeforge.gguf.key_values import Value, f32, string, u32

_SOFTCAP = 30.0
_EXPERTS = {"linear": "w1", "linear_1": "w2", "linear_v": "w3"}
_ONE = re.compile(r"\.moe\.(\d+)\.(linear|linear_1|linear_v)\.weight$")
_NEEDS = (*ATTENTION, "attn_output_norm", "ffn_norm", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@architecture("GrokForCausalLM", "Grok1ForCausalLM")
def grok(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | _softcaps(model)
    keys |= optional(u32, expert_feed_forward_length=model.find("moe_intermediate_size")) | _yarn(model)
    keys |= optional(u32, attention__temperature_length=model.find("attn_temperature_len") or None)
    scale = model.find("attn_output_multiplier")
    keys |= {
        "attention.output_scale": f32(model.head_dim**-0.5 if scale is None else scale),
        "embedding_scale": f32(model.require("embedding_multiplier_scale")),
        "logit_scale": f32(model.require("output_multiplier_scale")),
    }
    return make_spec(
        model,
        "grok",
        keys,
        stacked_experts,
        vocab="spm_or_gpt2",
        required_per_block=_NEEDS,
        rename=_name,
        stacked_order=("gate", "down", "up"),
    )


def _softcaps(model: HFModel) -> dict[str, Value]:
    given = {name: model.find(name) for name in ("attn_logit_softcapping", "router_logit_softcapping")}
    keys = {name: f32(_SOFTCAP if value is None else value) for name, value in given.items()}
    return keys | optional(f32, final_logit_softcapping=model.find("final_logit_softcapping") or None)


def _yarn(model: HFModel) -> dict[str, Value]:
    """Grok 2's rope scaling, at the root of its config; its type "original" is yarn."""
    if model.find("rope_type") not in ("yarn", "original"):
        return {}
    return {
        "rope.scaling.type": string("yarn"),
        "rope.scaling.factor": f32(model.require("scaling_factor")),
        "rope.scaling.original_context_length": u32(model.require("original_max_position_embeddings")),
        "rope.scaling.yarn_ext_factor": f32(model.require("extrapolation_factor")),
        "rope.scaling.yarn_attn_factor": f32(model.require("attn_factor")),
        "rope.scaling.yarn_beta_fast": f32(model.require("beta_fast")),
        "rope.scaling.yarn_beta_slow": f32(model.require("beta_slow")),
    }


def _name(name: str) -> str:
    """Grok 1's experts, named as other models name theirs."""
    return _ONE.sub(lambda found: f".moe.experts.{found[1]}.{_EXPERTS[found[2]]}.weight", name)
