"""EXAONE 3 and 4."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.constants import rope_freq_factors_llama3
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, GATED, make_spec
from mergeforge.gguf.key_values import Value, array, u32

_LAYERS_OF_32B = 64
_AFTER = (*ATTENTION[1:], "ffn_gate", "ffn_up", "ffn_down", "post_attention_norm", "post_ffw_norm")


@architecture("ExaoneForCausalLM")
def exaone(model: HFModel) -> GGUFModelSpec:
    part = model.rope.get("partial_rotary_factor", 1.0)
    keys = hparams(model) | {"rope.dimension_count": u32(int(part * (model.hidden // model.heads)))}
    return make_spec(
        model, "exaone", keys, vocab="gpt2", required_per_block=GATED, constants=rope_freq_factors_llama3(model)
    )


@architecture("Exaone4ForCausalLM")
def exaone4(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {"vocab_size": u32(model.require("vocab_size"))} | _window(model)
    constants = rope_freq_factors_llama3(model, factor=16.0)
    slides = model.layers != _LAYERS_OF_32B and model.find("sliding_window") is not None
    notes = [f"llama.cpp's exaone4 has a sliding window only with {_LAYERS_OF_32B} layers"] if slides else ()
    return make_spec(model, "exaone4", keys, vocab="gpt2", required_per_block=_AFTER, constants=constants, notes=notes)


def _window(model: HFModel) -> dict[str, Value]:
    if (window := model.find("sliding_window")) is None:
        return {}
    slides = [kind == "sliding_attention" for kind in model.find("layer_types") or ()]
    keys = {"attention.sliding_window": u32(window)}
    return keys | ({"attention.sliding_window_pattern": array("bool", slides)} if slides else {})
