"""Mellum 2: experts in every layer, sliding windows in those that layer_types names."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.experts import stacked_experts
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import GATED, make_spec
from mergeforge.gguf.key_values import array, u32


@architecture("MellumForCausalLM")
def mellum(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | optional(u32, expert_feed_forward_length=model.find("moe_intermediate_size"))
    window = model.find("sliding_window")
    if window is not None and model.find("use_sliding_window") in (None, True):
        keys["attention.sliding_window"] = u32(window)
        slides = [kind == "sliding_attention" for kind in model.require("layer_types")]
        keys["attention.sliding_window_pattern"] = array("bool", slides)
    return make_spec(
        model,
        "mellum",
        keys,
        stacked_experts,
        vocab="gpt2",
        required_per_block=(*GATED, "attn_q_norm", "attn_k_norm"),
        names_of="qwen3moe",
    )
