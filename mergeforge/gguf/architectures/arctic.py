"""Snowflake Arctic: a dense feed-forward and experts beside each other in every layer."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import ATTENTION, make_spec
from mergeforge.gguf.key_values import u32

_FEED_FORWARD = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_EXPERTS = ("ffn_norm_exps", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@architecture("ArcticForCausalLM")
def arctic(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {
        "vocab_size": u32(model.require("vocab_size")),
        "rope.dimension_count": u32(model.hidden // model.heads),
    }
    needs = (*ATTENTION, *_FEED_FORWARD, *_EXPERTS)
    return make_spec(
        model, "arctic", keys, permute_rope_heads, stacked_experts, vocab="arctic", required_per_block=needs
    )
