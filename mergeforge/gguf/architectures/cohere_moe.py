"""Cohere's Command A+ and North (cohere2_moe): experts, some of them shared, and layers that predict tokens."""

from __future__ import annotations

from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import NO_SCALING, hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, boolean, f32, u32

_NEEDS = (*ATTENTION, "ffn_gate|ffn_gate_exps", "ffn_up|ffn_up_exps", "ffn_down|ffn_down_exps")


@architecture("Cohere2MoeForCausalLM")
def cohere2_moe(model: HFModel) -> GGUFModelSpec:
    extra = prediction_layers(model, shift=0.0)
    notes = [*extra.notes]
    if any(name.endswith(".bias") for name in model.tensors):
        notes.append(WarningText("llama.cpp's cohere2moe has no biases: the result is right only if they are all zero"))
    keys = hparams(model) | {"block_count": u32(model.layers + extra.count)} | _keys(model) | _shared_expert_keys(model)
    keys |= prediction_layer_keys(extra.count) | {"rope.dimension_count": u32(model.require("head_dim")), **NO_SCALING}
    return make_spec(
        model,
        "cohere2moe",
        keys,
        biases,
        extra.rule,
        stacked_experts,
        vocab="gpt2",
        required_per_block=_NEEDS,
        layers=model.layers + extra.count,
        names_of="dots1",
        notes=notes,
    )


def _keys(model: HFModel) -> dict[str, Value]:
    slides = [kind == "sliding_attention" for kind in model.require("layer_types")]
    return {
        "logit_scale": f32(model.require("logit_scale")),
        "attention.sliding_window": u32(model.require("sliding_window")),
        "attention.sliding_window_pattern": array("bool", slides),
        "vocab_size": u32(model.require("vocab_size")),
        "expert_feed_forward_length": u32(model.require("intermediate_size")),
        "leading_dense_block_count": u32(_dense_layers(model)),
        "expert_weights_norm": boolean(bool(model.find("norm_topk_prob"))),
    }


def _dense_layers(model: HFModel) -> int:
    kinds = model.find("mlp_layer_types")
    if kinds is None:
        return int(model.find("first_k_dense_replace") or 0)
    return next((at for at, kind in enumerate(kinds) if kind != "dense"), len(kinds))


def _shared_expert_keys(model: HFModel) -> dict[str, Value]:
    count = int(model.find("num_shared_experts") or 0)
    if not count:
        return {}
    if (model.find("shared_expert_combination_strategy") or "average") != "average":
        raise SourceError("config.json: llama.cpp's cohere2moe averages shared experts only", hint="write safetensors")
    width = count * int(model.require("intermediate_size"))
    return {"expert_shared_count": u32(count), "expert_shared_feed_forward_length": u32(width)}


def biases(stored: HFTensor) -> RuleResult:
    return "llama.cpp's cohere2moe has no biases" if stored.is_bias else None
