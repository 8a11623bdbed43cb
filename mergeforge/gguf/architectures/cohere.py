"""Cohere's Command R, Aya (cohere) and Command R7B (cohere2)."""

from __future__ import annotations

from dataclasses import replace

from mergeforge.core.messages import WarningText
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.engine_limits import output_head_notes, sliding_window_warnings
from mergeforge.gguf.architectures.hparams import NO_SCALING, hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, HFTensor, RuleResult, make_spec, unused_head
from mergeforge.gguf.key_values import f32, u32

_LAYERS_WITH_NORMS = 64
_NEEDS = (*ATTENTION, "ffn_gate", "ffn_up", "ffn_down")


@architecture("CohereForCausalLM")
def command_r(model: HFModel) -> GGUFModelSpec:
    """The context is model_max_length, where the config has it."""
    context = model.require("model_max_length", "max_position_embeddings")
    model = replace(model, config={**model.config, "max_position_embeddings": context})
    keys = hparams(model) | {"logit_scale": f32(model.require("logit_scale"))} | NO_SCALING
    small = model.layers < _LAYERS_WITH_NORMS and model.find("use_qk_norm")
    notes = [*output_head_notes(model)]
    if small:
        notes.append(WarningText(f"llama.cpp loads query and key norms only with {_LAYERS_WITH_NORMS} layers or more"))
    return make_spec(model, "command-r", keys, unused_head, vocab="gpt2", required_per_block=_NEEDS, notes=notes)


@architecture("Cohere2ForCausalLM")
def cohere2(model: HFModel) -> GGUFModelSpec:
    part = model.find("rotary_pct") or model.rope.get("partial_rotary_factor", 1.0)
    keys = hparams(model) | {
        "logit_scale": f32(model.require("logit_scale")),
        "attention.sliding_window": u32(model.require("sliding_window")),
        "vocab_size": u32(model.require("vocab_size")),
        "rope.dimension_count": u32(int(part * (model.hidden // model.heads))),
        **NO_SCALING,
    }
    notes = [*sliding_window_warnings(model, True, period=4), *output_head_notes(model)]
    if any(name.endswith(".bias") for name in model.tensors):
        notes.append(WarningText("llama.cpp's cohere2 has no biases: the result is right only if they are all zero"))
    return make_spec(model, "cohere2", keys, unused_head, biases, vocab="gpt2", required_per_block=_NEEDS, notes=notes)


def biases(stored: HFTensor) -> RuleResult:
    return "llama.cpp's cohere2 has no biases" if stored.is_bias else None
