"""What transformers derives from layer numbers where a config.json does not say it.

Config classes fill lists such as layer_types from a rule (Gemma 2: every other layer slides), and models compare a
layer's number with keys such as first_k_dense_replace. hf_layer_rules.json has these for every model type (written by
tools/hf_layer_rules). Where a config changes what a list's default depends on, the class itself is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError

Config = Mapping[str, Any]


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("hf_layer_rules.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def is_known(part: Config) -> bool:
    """Whether transformers has the model type, so that the table says all that depends on layer numbers."""
    return part.get("model_type") in {*_table()["types"], *_table()["others"]}


def list_names(part: Config) -> tuple[str, ...]:
    """The lists with an entry for each layer that the config's class fills."""
    return tuple(_rules(part).get("lists", ()))


def is_settable(part: Config, name: str) -> bool:
    """Whether the class takes the list from config.json."""
    return bool(_rules(part)["lists"][name]["settable"])


def layer_list(part: Config, name: str, depth: int) -> list[Any]:
    """A list's entry for each of `depth` layers: the config's, or the default of its class. Raises RecipeError."""
    value = part.get(name)
    if isinstance(value, list) and len(value) >= depth:
        return list(value[:depth])
    rule = _rules(part)["lists"][name]
    if rule.get("depends_on_depth") or any(part.get(key, default) != default for key, default in rule["keys"].items()):
        return _ask_transformers(part, name, depth)
    start, cycle = rule["start"], rule["cycle"]
    return [start[at] if at < len(start) else cycle[(at - len(start)) % len(cycle)] for at in range(depth)]


def bounds(part: Config) -> dict[str, int]:
    """The keys that the model compares with a layer's number, and their values."""
    return _values(part, "bounds")


def periods(part: Config) -> dict[str, int]:
    """The keys by which the model takes the remainder of a layer's number, and their values."""
    return _values(part, "periods")


def _rules(part: Config) -> dict[str, Any]:
    rules: dict[str, Any] = _table()["types"].get(str(part.get("model_type")), {})
    return rules


def _values(part: Config, kind: str) -> dict[str, int]:
    values = {key: part.get(key, default) for key, default in _rules(part).get(kind, {}).items()}
    return {key: value for key, value in values.items() if isinstance(value, int)}


def _ask_transformers(part: Config, name: str, depth: int) -> list[Any]:
    """The list that the config's class makes for its values."""
    text = f"config.json has no {name}, and {part.get('model_type')} derives it from other keys"
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        hint = f"write {name} into the base's config.json, or install transformers, which computes it"
        raise RecipeError(text, hint=hint) from None
    try:
        config = CONFIG_MAPPING[str(part["model_type"])](**{key: value for key, value in part.items() if key != name})
        values = config.to_dict()[name]
    except Exception as error:
        raise RecipeError(f"{text}, which fails: {error}", hint=f"write {name} into the base's config.json") from error
    return list(values)[:depth]
