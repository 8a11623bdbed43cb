"""EXAONE 3 and 4."""

from __future__ import annotations

from mergeforge.core.messages import WarningText
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.constants import rope_freq_factors_llama3
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import NO_SCALING, hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layers
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, GATED, make_spec
from mergeforge.gguf.key_values import Value, array, boolean, f32, u32

_LAYERS_OF_32B = 64
_AFTER = (*ATTENTION[1:], "ffn_gate", "ffn_up", "ffn_down", "post_attention_norm", "post_ffw_norm")


@architecture("ExaoneForCausalLM")
def exaone(model: HFModel) -> GGUFModelSpec:
    part = model.rope.get("partial_rotary_factor", 1.0)
    keys = hparams(model) | {"rope.dimension_count": u32(int(part * (model.hidden // model.heads)))}
    return make_spec(
        model, "exaone", keys, vocab="gpt2", required_per_block=GATED, constants=rope_freq_factors_llama3(model)
    )


@architecture("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM")
def exaone_moe(model: HFModel) -> GGUFModelSpec:
    """K-EXAONE."""
    extra = prediction_layers(model, "mtp.", shift=0.0)
    size, shared = int(model.require("moe_intermediate_size")), int(model.require("num_shared_experts"))
    dense = model.find("first_k_dense_replace", "first_last_k_dense_replace") or 0
    keys = hparams(model) | {
        "block_count": u32(model.layers + extra.count),
        "vocab_size": u32(model.require("vocab_size")),
        **_window(model),
        "expert_feed_forward_length": u32(size),
        "expert_shared_count": u32(shared),
        "expert_shared_feed_forward_length": u32(size * shared),
        "expert_weights_scale": f32(model.require("routed_scaling_factor")),
        "expert_weights_norm": boolean(model.require("norm_topk_prob")),
        "leading_dense_block_count": u32(dense),
        "nextn_predict_layers": u32(extra.count),
        **NO_SCALING,
    }
    return make_spec(
        model,
        "exaone-moe",
        keys,
        extra.rule,
        stacked_experts,
        vocab="gpt2",
        required_per_block=GATED,
        layers=model.layers + extra.count,
        rename=extra.rename,
        constants=rope_freq_factors_llama3(model, factor=16.0),
        notes=extra.notes,
    )


@architecture("Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration")
def exaone4(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {"vocab_size": u32(model.require("vocab_size"))} | _window(model)
    constants = rope_freq_factors_llama3(model, factor=16.0)
    slides = model.layers != _LAYERS_OF_32B and model.find("sliding_window") is not None
    notes = (
        [WarningText(f"llama.cpp's exaone4 has a sliding window only with {_LAYERS_OF_32B} layers")] if slides else ()
    )
    return make_spec(model, "exaone4", keys, vocab="gpt2", required_per_block=_AFTER, constants=constants, notes=notes)


def _window(model: HFModel) -> dict[str, Value]:
    if (window := model.find("sliding_window")) is None:
        return {}
    slides = [kind == "sliding_attention" for kind in model.find("layer_types") or ()]
    keys = {"attention.sliding_window": u32(window)}
    return keys | ({"attention.sliding_window_pattern": array("bool", slides)} if slides else {})
