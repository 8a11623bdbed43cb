"""The value of a parameter at one tensor: filters by name, gradients over the layers.

The rules are mergekit's (mergekit/config.py, ConfigReader and evaluate_setting), so that its
configs mean the same here: a filter is a substring of the tensor's name and the first that
matches wins; a list of m numbers is interpolated linearly over the layers; tensors outside any
layer (embeddings, final norm, lm_head) take the first number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_LAYER = re.compile(r"^(.*?)\.?(\d+)\.")


def value_at(value: Any, name: str, position: float, *, kind: str = "float") -> Any:
    """The parameter's value for tensor `name` at layer position 0..1; None where no filter matches.

    A gradient of booleans (`kind` "bool") is not interpolated: the value before the position counts.
    """
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        for entry in value:
            substring = entry.get("filter")
            if substring in (None, "*") or substring in name:
                return value_at(entry["value"], name, position, kind=kind)
        return None
    return _gradient(value, position, kind) if isinstance(value, list) else value


def _gradient(values: list[Any], position: float, kind: str) -> Any:
    at = position * (len(values) - 1)
    low = int(at)
    if kind == "bool":
        return values[low]
    high, part = min(len(values) - 1, low + 1), at - low
    return (1 - part) * values[low] + part * values[high]


def scalars(value: Any) -> Iterator[Any]:
    """Yield every number or boolean in a parameter value."""
    if isinstance(value, list):
        for item in value:
            yield from scalars(item)
    elif isinstance(value, Mapping):
        yield from scalars(value.get("value"))
    elif value is not None:
        yield value


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack and index of a tensor's layer: ("model.layers", 3), or None outside any layer."""
    match = _LAYER.match(name)
    return (match[1], int(match[2])) if match else None


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Each tensor's position 0..1 in its stack of layers: index / (layers - 1), 1 in a stack of one."""
    layers = {name: layer_of(name) for name in names}
    depth: dict[str, int] = {}
    for layer in layers.values():
        if layer:
            depth[layer[0]] = max(depth.get(layer[0], 0), layer[1])
    return {
        name: 0.0 if layer is None else layer[1] / depth[layer[0]] if depth[layer[0]] else 1.0
        for name, layer in layers.items()
    }
