"""A config.json as llama.cpp's converter sees it: text part at the root, defaults filled in, one layout of rope.

The converter reads configs through transformers, so a file's meaning depends on the defaults and renamings of
transformers 5. Both layouts are read: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling` (4).
Model types without a row in hf_defaults.py (those with custom code on the Hub) are used as they are, as in the
converter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mergeforge.gguf.architectures.hf_defaults import hf_defaults

_TEXT_PARTS = ("text_config", "llm_config", "lm_config", "language_config", "lfm")  # the last one present wins
_TEXT_TYPES = {
    "mistral3": "mistral",
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "llava": "llama",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
}
_FROM_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM_COMPUTED = ("llama", "mistral", "ministral3", "gpt_oss", "llama4_text", "arcee", "seed_oss")
_LATENT_HEADS = ("deepseek_v2", "deepseek_v3")  # their head_dim is the size of the rotary part
_PER_LAYER_ROPE = ("gemma3_text", "olmo3", "mellum")  # two ropes: for full and for sliding attention
_ATTENTION = ("full_attention", "sliding_attention")
_EXTENDED = ("llama3", "yarn", "longrope")  # rope types with the pretraining context
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_THETAS = ("global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base")
_LOCAL_THETAS = ("local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq")
_PARTIAL = ("partial_rotary_factor", "rope_pct", "rope_percent")


def with_hf_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's config with everything that transformers would add; always with `rope_parameters`."""
    whole = copy.deepcopy(dict(config))
    part = text_part(whole)
    text = dict(whole if part is None else part)
    kind = str(text.get("model_type") or whole.get("model_type") or "")
    kind = text["model_type"] = _TEXT_TYPES.get(kind, kind if text.get("model_type") else "")
    filled = {**whole, **(_filled(kind, text) if kind in hf_defaults() else text)}
    filled["rope_parameters"] = _mirrored(filled)
    return filled


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config of the text model inside of one for several modalities."""
    thinker = config.get("thinker_config")
    if isinstance(thinker, Mapping) and isinstance(thinker.get("text_config"), Mapping):
        config = thinker
    return next((config[key] for key in reversed(_TEXT_PARTS) if isinstance(config.get(key), Mapping)), None)


def _filled(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config with its class's defaults and computed values."""
    if kind == "gpt2":
        config = {_GPT2_NAMES.get(key, key): value for key, value in config.items()}
    filled = {**hf_defaults()[kind], **config}
    for key in _FROM_HEADS:
        if key in filled and filled[key] is None:
            filled[key] = filled.get("num_attention_heads")
    stated = filled.get("hidden_size") and filled.get(
        "num_attention_heads"
    )  # otherwise their use shows what is missing
    if kind in _HEAD_DIM_COMPUTED and filled.get("head_dim") is None and stated:
        filled["head_dim"] = filled["hidden_size"] // filled["num_attention_heads"]
    if kind == "cohere2" and stated:
        filled["head_dim"] = filled["hidden_size"] // filled["num_attention_heads"]
    if kind in _LATENT_HEADS:
        filled["head_dim"] = filled["qk_rope_head_dim"]
    if filled.get("num_decoder_layers", 0) is None:
        filled["num_decoder_layers"] = filled["num_layers"]
    if filled.get("layer_types") is None and (pattern := _layer_types(kind, filled)):
        filled["layer_types"] = pattern
    if "rope_theta" in hf_defaults()[kind]:
        filled["rope_parameters"] = _rope(kind, filled, config)
        for key in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
            filled.pop(key, None)
    return filled


def _layer_types(kind: str, config: Mapping[str, Any]) -> list[str]:
    layers = range(int(config["num_hidden_layers"])) if "num_hidden_layers" in config else range(0)
    if kind in ("olmo3", "cohere2", "exaone4"):
        pattern = "LLLG" if kind == "olmo3" else _pattern(config.get("sliding_window_pattern") or 4)
        slides = kind != "exaone4" or config.get("sliding_window") is not None
        return [_ATTENTION[slides and pattern[at % len(pattern)] == "L"] for at in layers]
    if kind == "mellum":
        return ["full_attention" for _ in layers]
    if kind in ("lfm2", "lfm2_moe") and config.get("full_attn_idxs") is not None:
        return ["full_attention" if at in config["full_attn_idxs"] else "conv" for at in layers]
    if kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        period = int(config.get("full_attention_interval") or 4)
        return ["linear_attention" if (at + 1) % period else "full_attention" for at in layers]
    if kind == "llama4_text":
        period = int(config.get("no_rope_layer_interval") or 4)
        rope = config.get("no_rope_layers") or [(at + 1) % period != 0 for at in layers]
        return ["chunked_attention" if one else "full_attention" for one in rope]
    return []


def _pattern(stated: int | str) -> str:
    """Local and global layers: EXAONE 4 lists them (LLLG), others give the period of global layers."""
    return stated if isinstance(stated, str) else "L" * (stated - 1) + "G"


def _rope(kind: str, filled: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters as transformers 5 builds them from either layout."""
    if kind in _PER_LAYER_ROPE:
        return _rope_per_layer(kind, filled, config)
    rope = dict(filled.get("rope_scaling") or filled.get("rope_parameters") or _own_rope(kind, filled))
    nested = [rope[key] for key in ("full_attention", "sliding_attention") if isinstance(rope.get(key), dict)]
    for one in nested or [rope]:
        theta = "rotary_emb_base" if kind == "gpt_neox" else "rope_theta"
        partial = "rotary_pct" if kind == "gpt_neox" else "partial_rotary_factor"
        one.setdefault("rope_theta", filled.get(theta, filled["rope_theta"]))
        if (value := filled.get(partial, filled.get("partial_rotary_factor"))) is not None:
            one.setdefault("partial_rotary_factor", value)
        _standardized(kind, one, filled)
    return rope


def _standardized(kind: str, rope: dict[str, Any], config: Mapping[str, Any]) -> None:
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] in _EXTENDED and kind == "phi3":
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    elif rope["rope_type"] in _EXTENDED:
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    if kind == "phi3" and rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"


def _own_rope(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope of classes with a special default."""
    if kind == "gpt_oss":
        own = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
        return {**own, "truncate": False, "original_max_position_embeddings": 4096}
    if kind == "ministral3":
        own = {"type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
        more = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0}
        return {**own, **more, "llama_4_scaling_beta": 0.1}
    return {}


def _rope_per_layer(kind: str, filled: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    rope = {key: value for key, value in (filled.get("rope_parameters") or {}).items() if value is not None}
    full = {**rope.get("full_attention", {}), **(filled.get("rope_scaling") or {})}
    sliding = dict(rope.get("sliding_attention", {}))
    full.setdefault("rope_theta", filled["rope_theta"])
    local = hf_defaults()[kind]["rope_theta"] if kind == "olmo3" else config.get("rope_local_base_freq", 10000.0)
    sliding.setdefault("rope_theta", local)
    for one in (full, sliding):
        _standardized(kind, one, filled)
    return {**rope, "full_attention": full, "sliding_attention": sliding}


def _mirrored(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters with the values that the converter adds from the root of the config."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in rope or "sliding_attention" in rope:
        return rope
    if (local := _first(config, _LOCAL_THETAS)) is not None:
        rope["sliding_attention"] = {"rope_theta": local}
    found = {
        "rope_theta": _first(config, _THETAS),
        "rope_type": rope.get("type"),
        "partial_rotary_factor": _first(config, _PARTIAL),
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    }
    return {**{key: value for key, value in found.items() if value is not None}, **rope}


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if key in config), None)
