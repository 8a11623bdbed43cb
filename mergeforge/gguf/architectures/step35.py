"""Step 3.5 and 3.7: head-wise attention gates, two kinds of attention, norms stored as offsets from one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.gemma import norms
from mergeforge.gguf.architectures.hparams import hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.prediction_layers import prediction_layer_keys, prediction_layers
from mergeforge.gguf.architectures.tensor_mapping import GATED, make_spec
from mergeforge.gguf.key_values import Value, array, boolean, f32, u32

if TYPE_CHECKING:
    import numpy as np

_ROTATED = {True: 1.0, False: 0.5}  # the part of a head that llama.cpp rotates: with and without a sliding window


@architecture("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")
def step35(model: HFModel) -> GGUFModelSpec:
    model = replace(model, config={**model.config, "rope_parameters": _rope(model)})
    extra = prediction_layers(model)
    blocks = model.layers + extra.count
    slides = _slides(model, blocks)
    keys = hparams(model) | {"block_count": u32(blocks)} | _attention_keys(model, slides) | _expert_keys(model)
    keys |= {"attention.layer_norm_rms_epsilon": f32(model.find("rms_norm_eps") or 1e-5)}
    keys |= _limits(model, "swiglu_limits", "swiglu_clamp_exp", blocks)
    keys |= _limits(model, "swiglu_limits_shared", "swiglu_clamp_shexp", blocks)
    return make_spec(
        model,
        "step35",
        keys | prediction_layer_keys(extra.count),
        extra.rule,
        norms,
        vocab="gpt2",
        required_per_block=(*GATED, "attn_q_norm", "attn_k_norm"),
        layers=blocks,
        rename=_name,
        constants=_rope_factors(model),
        notes=extra.notes,
    )


def _rope(model: HFModel) -> Mapping[str, Any]:
    """rope_theta may be a list for each layer: the first is that of full attention, the second of sliding windows."""
    theta = model.find("rope_theta")
    if not isinstance(theta, list):
        return model.rope
    return {**model.rope, "rope_theta": theta[0], "sliding_attention": {"rope_theta": theta[1]}}


def _slides(model: HFModel, blocks: int) -> list[bool]:
    """Whether each layer has a sliding window. Raises SourceError unless llama.cpp rotates what the model does."""
    kinds = _filled(model.find("layer_types"), blocks, "full_attention")
    slides = [kind == "sliding_attention" for kind in kinds]
    parts = _filled(model.find("partial_rotary_factors"), blocks, 0.5)
    if parts != [_ROTATED[one] for one in slides]:
        text = "config.json: llama.cpp's step35 needs partial_rotary_factors of 1 with a sliding window, else of 0.5"
        raise SourceError(text, hint="write safetensors")
    return slides


def _filled(values: Any, count: int, default: Any) -> list[Any]:
    return [*(values or ()), *[default] * count][:count]


def _attention_keys(model: HFModel, slides: list[bool]) -> dict[str, Value]:
    heads, groups = int(model.heads), int(model.require("num_attention_groups"))
    other = model.find("attention_other_setting") or {}
    sizes = {False: (heads, groups)}
    sizes[True] = (other.get("num_attention_heads", heads), other.get("num_attention_groups", groups))
    return {
        "attention.head_count": array("i32", [sizes[one][0] for one in slides]),
        "attention.head_count_kv": array("i32", [sizes[one][1] for one in slides]),
        "attention.sliding_window": u32(model.require("sliding_window")),
        "attention.sliding_window_pattern": array("bool", slides),
        "attention.value_length": u32(model.require("head_dim")),
    }


def _expert_keys(model: HFModel) -> dict[str, Value]:
    keys = {
        "expert_count": u32(model.require("moe_num_experts")),
        "expert_used_count": u32(model.require("moe_top_k")),
        "expert_feed_forward_length": u32(model.require("moe_intermediate_size")),
        "expert_shared_feed_forward_length": u32(model.require("share_expert_dim")),
    }
    keys |= optional(f32, expert_weights_scale=model.find("moe_router_scaling_factor"))
    keys |= optional(boolean, expert_weights_norm=model.find("norm_expert_weight"))
    listed = [int(layer) for layer in str(model.find("moe_layers_enum") or "").split(",") if layer.strip()]
    every = int(model.find("moe_every_n_layer") or 1)
    return keys | {"leading_dense_block_count": u32(min(listed, default=0)), "moe_every_n_layers": u32(every)}


def _limits(model: HFModel, name: str, key: str, blocks: int) -> dict[str, Value]:
    """Limits of the activation for each layer; 0 means none."""
    if (limits := model.find(name)) is None:
        return {}
    return {key: array("f32", _filled([float(limit or 0.0) for limit in limits], blocks, 0.0))}


def _name(name: str) -> str:
    """A prediction layer's head is inside of `transformer`; the router's bias has no ending."""
    name = f"{name}.bias" if name.endswith(".moe.router_bias") else name
    return re.sub(r"\.transformer\.shared_head\.output\.", ".shared_head.head.", name).replace(".transformer.", ".")


def _rope_factors(model: HFModel) -> Mapping[str, np.ndarray]:
    """rope_freqs.weight of llama3 rope for layers with full attention; the dimensions not rotated there have 1."""
    import numpy as np
    import torch

    rope = model.full_rope
    if str(rope.get("rope_type", "")).lower() != "llama3":
        return {}
    rotated = int(model.head_dim * _ROTATED[False])
    steps = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    waves = [2 * math.pi / float(one) for one in 1.0 / (float(rope.get("rope_theta", 10000.0)) ** steps)]
    divisors = [_divisor(wave, rope) for wave in waves]
    return {"rope_freqs.weight": np.asarray(_filled(divisors, model.head_dim // 2, 1.0), dtype=np.float32)}


def _divisor(wave: float, rope: Mapping[str, Any]) -> float:
    """Of a frequency, given its wave length (transformers: _compute_llama3_parameters)."""
    context, factor = float(rope.get("original_max_position_embeddings", 8192)), float(rope.get("factor", 8.0))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    if wave < context / high:
        return 1.0
    if wave > context / low:
        return factor
    smooth = (context / wave - low) / (high - low)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
