"""The key/values that most families share, in the converter's order.

Names are without the architecture's prefix; `general.` and `tokenizer.` keys have none. A family adds its own with
`|`: an existing key keeps its position and gets the new value, as in the converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.key_values import Value, array, boolean, f32, string, u32

FILE_TYPE = {"general.file_type": u32(0)}
NO_SCALING = {"rope.scaling.type": string("none")}
_CONTEXT = ("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length", "model_max_length")
_FEED_FORWARD = (
    "prefix_dense_intermediate_size",
    "dense_intermediate_size",
    "intermediate_size",
    "n_inner",
    "hidden_dim",
)
_GATING = ("score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func")
_GATING_TYPES = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}


def hparams(model: HFModel) -> dict[str, Value]:
    """Sizes, rope, norms, experts, head sizes and the file type of a decoder."""
    return {
        **_sizes(model),
        **rope_scaling(model.full_rope),
        **_rope(model),
        **_norms(model),
        **_experts(model),
        **head_sizes(model.config.get("head_dim")),
        **FILE_TYPE,
    }


def head_sizes(head_dim: int | None) -> dict[str, Value]:
    if head_dim is None:
        return {}
    return {"attention.key_length": u32(head_dim), "attention.value_length": u32(head_dim)}


def layer_counts(name: str, value: Any) -> dict[str, Value]:
    """A count, or a list of one count for each layer."""
    if isinstance(value, list):
        return {name: array("i32", value)}
    return {} if value is None else {name: u32(value)}


def optional(kind: Any, **values: Any) -> dict[str, Value]:
    """Keys whose values are not None; `__` in a name stands for a dot."""
    return {name.replace("__", "."): kind(value) for name, value in values.items() if value is not None}


def _sizes(model: HFModel) -> dict[str, Value]:
    keys = {"block_count": u32(model.layers)} | optional(
        u32,
        context_length=model.find(*_CONTEXT),
        embedding_length=model.find("hidden_size", "n_embd", "dim"),
    )
    keys |= layer_counts("feed_forward_length", model.find(*_FEED_FORWARD))
    keys |= optional(u32, attention__head_count=model.find("num_attention_heads", "n_head", "n_heads"))
    keys |= layer_counts("attention.head_count_kv", model.find("num_key_value_heads", "n_kv_heads"))
    return keys | ({"attention.causal": boolean(False)} if model.find("is_causal") is False else {})


def rope_scaling(rope: Mapping[str, Any]) -> dict[str, Value]:
    """Keys of rope scaling; llama3 and dynamic have none (llama3 is a tensor, see constants.py)."""
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind == "linear" and factor is not None:
        return {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(factor)}
    if kind == "yarn" and factor is not None:
        return _yarn(rope, factor)
    return {"rope.scaling.type": string("longrope")} if kind in ("su", "longrope") else {}


def _yarn(rope: Mapping[str, Any], factor: float) -> dict[str, Value]:
    if (context := rope.get("original_max_position_embeddings")) is None:
        raise SourceError(
            "config.json: yarn rope scaling has no 'original_max_position_embeddings'",
            hint="copy it from the base model",
        )
    return {
        "rope.scaling.type": string("yarn"),
        "rope.scaling.factor": f32(factor),
        "rope.scaling.original_context_length": u32(context),
    } | optional(
        f32,
        rope__scaling__yarn_ext_factor=rope.get("extrapolation_factor"),
        rope__scaling__yarn_attn_factor=rope.get("attention_factor", rope.get("attn_factor")),
        rope__scaling__yarn_beta_fast=rope.get("beta_fast"),
        rope__scaling__yarn_beta_slow=rope.get("beta_slow"),
    )


def _rope(model: HFModel) -> dict[str, Value]:
    keys = {}
    if (sections := model.rope.get("mrope_section")) is not None:
        keys["rope.dimension_sections"] = array("i32", [*sections, 0, 0, 0, 0][:4])
    sliding = model.rope.get("sliding_attention") or {}
    return keys | optional(
        f32,
        rope__freq_base=model.full_rope.get("rope_theta"),
        rope__freq_base_swa=sliding.get("rope_theta"),
    )


def _norms(model: HFModel) -> dict[str, Value]:
    return optional(
        f32,
        attention__layer_norm_rms_epsilon=model.find("rms_norm_eps", "norm_eps"),
        attention__layer_norm_epsilon=model.find("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    )


def _experts(model: HFModel) -> dict[str, Value]:
    keys = optional(
        u32,
        expert_count=model.find("num_local_experts", "num_experts", "n_routed_experts"),
        expert_used_count=model.find("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
        expert_group_count=model.find("n_group"),
        expert_group_used_count=model.find("topk_group"),
    )
    gating = model.find(*_GATING, "expert_selection_fn", "router_score_func")
    if gating is None:
        return keys
    if gating not in _GATING_TYPES:
        known = ", ".join(_GATING_TYPES)
        raise SourceError(f"config.json: llama.cpp has no expert gating '{gating}'", hint=f"it knows {known}")
    return keys | {"expert_gating_func": u32(_GATING_TYPES[gating])}
