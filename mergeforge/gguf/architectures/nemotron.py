"""Nemotron and Minitron: norms stored as offsets from one, a feed-forward without gate."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.gemma import norms
from mergeforge.gguf.architectures.hparams import NO_SCALING, hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import DECODER, make_spec
from mergeforge.gguf.key_values import f32, string, u32


@architecture("NemotronForCausalLM")
def nemotron(model: HFModel) -> GGUFModelSpec:
    eps = model.require("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    rotated = int(model.rope.get("partial_rotary_factor", 0.5) * model.hidden) // model.heads
    keys = hparams(model) | {
        "vocab_size": u32(model.require("vocab_size")),
        "attention.layer_norm_epsilon": f32(eps),
        "rope.dimension_count": u32(rotated),
    }
    factor = model.find("factor") or model.rope.get("factor")
    scaling = {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(factor)} if factor else NO_SCALING
    return make_spec(model, "nemotron", keys | scaling, norms, vocab="nemotron", required_per_block=DECODER)
