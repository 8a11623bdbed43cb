"""Maple: experts, a window in most layers, no rope in those with full attention."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import GATED, make_spec
from mergeforge.gguf.key_values import array, u32

_LIMIT = 7.0  # of the activation, fixed in Maple's modeling_maple.py
_FIXED = {"hidden_act": "silu", "num_shared_experts": 0, "norm_topk_prob": True, "nope_on_global_attention": True}


@architecture("MapleForCausalLM")
def maple(model: HFModel) -> GGUFModelSpec:
    _check(model)
    rotated = int(model.head_dim * model.rope.get("partial_rotary_factor", 1.0))
    slides = [kind == "sliding_attention" for kind in model.require("layer_types")]
    keys = hparams(model) | {
        "vocab_size": u32(model.require("vocab_size")),
        "rope.dimension_count": u32(rotated),
        "attention.sliding_window": u32(model.require("sliding_window")),
        "attention.sliding_window_pattern": array("bool", slides),
        "expert_feed_forward_length": u32(model.require("moe_intermediate_size")),
        "swiglu_clamp_exp": array("f32", [_LIMIT] * model.layers),
    }
    return make_spec(
        model,
        "maple",
        keys,
        stacked_experts,
        vocab="gpt2",
        required_per_block=(*GATED, "attn_q_norm", "attn_k_norm"),
        names_of="qwen3moe",
    )


def _check(model: HFModel) -> None:
    """Raise SourceError for a setting that llama.cpp's maple does not have."""
    for key, value in _FIXED.items():
        if (found := model.find(key)) not in (value, None) or (found is None and key == "nope_on_global_attention"):
            text = f"config.json: llama.cpp's maple needs {key} {value}, not {found}"
            raise SourceError(text, hint="write safetensors")
