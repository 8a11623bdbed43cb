"""The config of a model whose layers were stacked: how many there are, and what it says about each.

Lists with an entry for each layer (layer_types, block_configs, ...) take each entry from the model that the layer comes
from. Lists of layer numbers are renumbered. Where a class derives such a list by a rule (every sixth layer has full
attention), the list is written out if the stacked layers break the rule. What no list can say is refused: such a model
would load and compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.planner.layer_rules import bounds, is_known, is_settable, layer_list, list_names, periods
from mergeforge.planner.layer_slices import DEPTHS, LayerStack

Config = Mapping[str, Any]

_ENCODER = ("encoder_layers", "num_encoder_layers", "num_layers")
_DECODER = ("num_decoder_layers", "decoder_layers")
_TOWERS = {"vision_config": ("vision", "visual"), "audio_config": ("audio",)}
_NOT_PER_LAYER = ("architectures", "_token_id", "_token_ids", "_tokens", "_section", "_size", "_sizes")
_NUMBERS = ("layers", "_idxs", "_idx", "_indices")  # endings of keys whose lists hold layer numbers
_LEADING = ("first_k_dense_replace", "num_dense_layers")  # the first N layers are dense
_PERIODS = (
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "attn_layer_period",
    "expert_layer_period",
    "cross_attention_every_n_layers",
)
# Endings of keys by which classes that transformers does not have may tell layers apart.
_TELLS_LAYERS_APART = re.compile(
    r"(_pattern|_interval|_period|_frequency|_freq|_step|_every(_n_layers)?|_every_n|_offset|_(start|end)_index|_window_layers)$"
)


def stacked_config(config: Config, stacks: Sequence[LayerStack]) -> dict[str, Any]:
    """The config for the output's layers. Raises RecipeError for layers that no config can describe."""
    result = dict(config)
    for stack in stacks:
        where = _part(config, stack.prefix)
        part = _restacked(_inner(config, where), stack, where)
        result = {**result, where: part} if where else {**result, **part}
    return result


def _part(config: Config, prefix: str) -> str:
    """The nested config that describes a stack; "" is the outer one."""
    for key, words in _TOWERS.items():
        if key in config and any(word in prefix for word in words):
            return key
    return "text_config" if isinstance(config.get("text_config"), Mapping) else ""


def _inner(config: Config, where: str) -> Config:
    inner = config.get(where) if where else config
    return inner if isinstance(inner, Mapping) else {}


def _depth_keys(part: Config, prefix: str) -> list[str]:
    """The keys that hold the number of layers of a stack."""
    named = _ENCODER if "encoder" in prefix else _DECODER if "decoder" in prefix else ()
    present = [key for key in named if isinstance(part.get(key), int)]
    return present[:1] or [key for key in (*DEPTHS, "depth") if isinstance(part.get(key), int)]


def _restacked(part: Config, stack: LayerStack, where: str) -> dict[str, Any]:
    keys = _depth_keys(part, stack.prefix)
    if not keys:
        known = ", ".join(DEPTHS)
        raise RecipeError(f"config.json does not say how many layers {stack.prefix} has", hint=f"known keys: {known}")
    before = part[keys[0]]
    layers = [(_inner(source.model.config, where), layer) for source, layer in stack.layers]
    if all(layer == number for number, (_, layer) in enumerate(layers)) and len(layers) == before:
        return dict(part)
    result = {**part, **_lists_written_out(part, layers, before)}
    _check_layer_numbers(part, layers, before)
    for key, value in part.items():
        if key in list_names(part):
            continue
        if _is_per_layer(key, value, before):
            entries = [_entry(own, key, layer, value) for own, layer in layers]
            result[key] = "".join(entries) if isinstance(value, str) else entries
        elif _is_numbers(key, value, before):
            result[key] = [number for number, (own, layer) in enumerate(layers) if layer in (own.get(key) or ())]
        elif key in _LEADING and value:
            result[key] = _leading(key, layers)
        elif key in _PERIODS or (not is_known(part) and _TELLS_LAYERS_APART.search(key)):
            _check_period(key, value, layers, part)
    return result | dict.fromkeys(keys, len(layers))


def _is_per_layer(key: str, value: Any, depth: int) -> bool:
    if isinstance(value, str):
        return "pattern" in key and len(value) == depth
    return isinstance(value, list) and len(value) == depth and not key.endswith(_NOT_PER_LAYER)


def _entry(own: Config, key: str, layer: int, otherwise: Any) -> Any:
    value = own.get(key, otherwise)
    return value[layer] if layer < len(value) else otherwise[layer % len(otherwise)]


def _is_numbers(key: str, value: Any, depth: int) -> bool:
    numbers = isinstance(value, list) and all(isinstance(number, int) and 0 <= number < depth for number in value)
    return bool(numbers and value and key.endswith(_NUMBERS))


def _leading(key: str, layers: Sequence[tuple[Config, int]]) -> int:
    """The number of leading layers that are of the leading kind."""
    leads = [layer < int(own.get(key) or 0) for own, layer in layers]
    count = leads.index(False) if False in leads else len(leads)
    if any(leads[count:]):
        text = (
            f"layer {leads.index(True, count)} of the stack is of a kind that its model has only at the start ({key})"
        )
        raise RecipeError(text, hint="config.json cannot describe that; put such layers only at the start")
    return count


def _check_period(key: str, value: Any, layers: Sequence[tuple[Config, int]], part: Config) -> None:
    """Raise RecipeError where the stacked layers do not follow the period in the config."""
    written_out = {"no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers"}.get(key)
    if not isinstance(value, int) or value < 2 or (written_out and part.get(written_out)):
        return
    for number, (_, layer) in enumerate(layers):
        if number % value != layer % value:
            text = (
                f"config.json says with '{key}: {value}' which layers differ; layer {layer} would become layer {number}"
            )
            raise RecipeError(text, hint=f"stack layers so that each keeps its number modulo {value}")


def _lists_written_out(part: Config, layers: Sequence[tuple[Config, int]], depth: int) -> dict[str, list[Any]]:
    """The lists that the class fills, with the entries of the stacked layers, where config.json has to hold them.

    Raises RecipeError if the class takes no such list.
    """
    lists: dict[str, list[Any]] = {}
    for name in list_names(part):
        own = {id(config): layer_list(config, name, _depth_of(config, depth)) for config, _ in layers}
        entries = [own[id(config)][layer] for config, layer in layers]
        if part.get(name) is None and entries == layer_list(part, name, len(layers)):
            continue
        if not is_settable(part, name):
            text = f"{part['model_type']} derives {name} from the layers' numbers, which the stack changes"
            raise RecipeError(text, hint="config.json cannot describe that; keep the layers in their places")
        lists[name] = entries
    return lists


def _depth_of(config: Config, otherwise: int) -> int:
    return next((config[key] for key in (*DEPTHS, "depth") if isinstance(config.get(key), int)), otherwise)


def _check_layer_numbers(part: Config, layers: Sequence[tuple[Config, int]], depth: int) -> None:
    """Raise RecipeError where the model would take a layer for another kind, because of its new number."""
    for key, value in bounds(part).items():
        if key in _LEADING:
            continue
        for number, (_, layer) in enumerate(layers):
            old, new = (depth - 1, len(layers) - 1) if key == "num_hidden_layers" else (value, value)
            if (layer > old, layer == old) != (number > new, number == new):
                text = f"the model compares layer numbers with '{key}: {value}'; layer {layer} would become {number}"
                raise RecipeError(text, hint="keep the layers on their side of that number")
    for key, value in periods(part).items():
        if key not in _PERIODS:
            _check_period(key, value, layers, part)
