"""What a config.json says about how a model computes, under one name each, whatever the model family calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeforge.gguf.architectures.hf_defaults import hf_defaults

# A difference in one of these makes an average of the weights meaningless: equal shapes are computed with differently.
DECISIVE: dict[str, tuple[str, ...]] = {
    "attention heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"),
    "encoder attention heads": ("encoder_attention_heads",),
    "key-value heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head size": ("head_dim", "kv_channels", "d_kv"),
    "activation": ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj"),
    "share of rotated dimensions": ("partial_rotary_factor", "rotary_pct", "rotary_dim"),
    "kind of positions": ("position_embedding_type", "alibi"),
    "is_encoder_decoder": ("is_encoder_decoder",),
    "query groups": ("new_decoder_architecture", "multi_query"),
}
# A difference in one of these is probably not meant, but such merges are made.
DOUBTFUL: dict[str, tuple[str, ...]] = {
    "norm epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "sliding window": ("sliding_window",),
    "softcapping of attention": ("attn_logit_softcapping",),
    "softcapping of logits": ("final_logit_softcapping",),
    "attention scale": ("query_pre_attn_scalar", "attention_multiplier"),
    "embedding scale": ("embedding_multiplier", "scale_embedding"),
    "residual scale": ("residual_multiplier",),
    "logit scale": ("logits_scaling", "logit_scale"),
    "experts per token": ("num_experts_per_tok", "moe_topk"),
    "normalized expert weights": ("norm_topk_prob",),
    "scale of routed experts": ("routed_scaling_factor",),
    "layer kinds": ("layer_types",),
}
_ROPE = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types that a config states: its own, and those of its text model."""
    return {str(part["model_type"]) for part in (config, _text_config(config)) if part.get("model_type")}


def decisive_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of DECISIVE; a size that is left out or null follows from the others."""
    text = {**config, **_text_config(config)}
    found = {name: value for name, value in _values(text, DECISIVE).items() if value is not None}
    heads, width = found.get("attention heads"), text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
    if isinstance(heads, int) and heads > 0:
        found.setdefault("key-value heads", heads)
        if isinstance(width, int):
            found.setdefault("head size", width // heads)
    return found


def doubtful_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of DOUBTFUL, and rope; null switches something off, such as a sliding window."""
    text = {**config, **_text_config(config)}
    found = _values(text, DOUBTFUL)
    if not text.get("use_sliding_window", True):
        found["sliding window"] = None
    return found | rope_facts(config)


def _values(text: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The value of the first key of each name that the config has, or transformers has a default for."""
    known = {**_defaults(text), **_plain(text.get("rope_parameters")), **text}
    present = {name: [key for key in keys if key in known] for name, keys in names.items()}
    return {name: known[keys[0]] for name, keys in present.items() if keys}


def rope_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theta and scaling of rotary positions, from `rope_parameters` (transformers 5) or the keys before it."""
    text = {**config, **_text_config(config)}
    parameters = text.get("rope_parameters")
    if isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values()):
        return {f"rope of {kind}": _plain(value) for kind, value in parameters.items()}  # one for each kind of layer
    theta = _plain(parameters).get("rope_theta") or text.get("rope_theta") or _defaults(text).get("rope_theta")
    scaling = {**_plain(text.get("rope_scaling")), **_plain(parameters)}
    kind = scaling.get("rope_type") or scaling.get("type")
    scaled = {key: value for key, value in scaling.items() if key not in _ROPE}
    is_scaled = kind not in (None, "default")
    return {"rope theta": theta, "rope scaling": {"rope_type": kind, **scaled} if is_scaled else None} if theta else {}


def _defaults(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return hf_defaults().get(str(text.get("model_type")), {})


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else {}


def _plain(value: Any) -> dict[str, Any]:
    """The entries of an object that say something."""
    return {key: inner for key, inner in value.items() if inner is not None} if isinstance(value, Mapping) else {}
