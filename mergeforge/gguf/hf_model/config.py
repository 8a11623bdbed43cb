"""config.json from the keys of a GGUF file: the class's defaults, values that a key is equal to, and computed ones.

A rule is a function of the config so far, which it changes. It writes a value only where the class has it (or, in the
model's own text part, where transformers would look for it), and only if the file has the key that it is computed from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from typing import Any

from mergeforge.gguf.hf_model.classes import HFClass
from mergeforge.gguf.hf_model.keys import ModelKeys
from mergeforge.gguf.hf_model.layers import LAYER_RULES
from mergeforge.gguf.hf_model.rope import ROPE_RULES
from mergeforge.gguf.hf_model.sizes import SIZE_RULES

_TEXT_PARTS = ("text_config", "llm_config", "lm_config", "language_config")
_ROLES = {"bos": "bos", "eos": "eos", "padding": "pad"}
_SEVERAL = ("rope.freq_base", "rope.freq_base_swa", "context_length")  # keys that two values of a config are equal to


def propose_config(entry: HFClass, keys: ModelKeys, dtype: str) -> dict[str, Any]:
    """The config of a model of this class, if the file holds one; dtype: torch's name."""
    config = copy.deepcopy(dict(entry.config))
    for key, paths in entry.keys.items():
        value = keys.get(key)
        for path in paths if key in _SEVERAL else paths[:1]:
            _put(config, path, value) if value is not None else _unset(config, path)
    part = text_part(config)
    for rule in (*SIZE_RULES, *LAYER_RULES, *ROPE_RULES):
        rule(part, keys, entry)
    if isinstance(part.get("rope_scaling"), dict):  # the class has its rope in one place
        part["rope_scaling"] = part.pop("rope_parameters", {}) | part["rope_scaling"]
    tied = "output.weight" not in keys.shapes
    for place in (config, part):
        place["tie_word_embeddings"] = tied
    return config | _token_ids(keys) | {"dtype": dtype}


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The config itself, or that of its text model."""
    found: dict[str, Any] = next((config[name] for name in _TEXT_PARTS if name in config), config)
    return found


def set_flags(config: dict[str, Any], entry: HFClass, found: Set[str]) -> None:
    """Set the booleans that say which tensors a model has; found: the patterns of those that it has."""
    for path, (on, pattern) in entry.flags.items():
        _put(config, path, on if pattern in found else not on)


def unset_paths(config: dict[str, Any], entry: HFClass, keys: list[str]) -> bool:
    """Set the values of these keys to null; whether any had one."""
    paths = [path for key in keys for path in entry.keys.get(key, ())]
    for path in paths:
        _put(config, path, None)
    return bool(paths)


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the tokens that begin and end a text."""
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}


def _token_ids(keys: ModelKeys) -> dict[str, int]:
    """The tokens that begin, end and pad a text, if the vocabulary has them."""
    ids = {short: keys.get(f"tokenizer.ggml.{role}_token_id") for role, short in _ROLES.items()}
    rows = keys.shapes.get("token_embd.weight", (0,))[0]
    return {f"{short}_token_id": token for short, token in ids.items() if isinstance(token, int) and 0 <= token < rows}


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for key in outer:
        inner = config.get(key)
        config[key] = config = dict(inner) if isinstance(inner, Mapping) else {}
    config[last] = value


def _unset(config: dict[str, Any], path: str) -> None:
    *outer, last = path.split(".")
    for key in outer:
        inner = config.get(key)
        if not isinstance(inner, dict):
            return
        config = inner
    config.pop(last, None)
