"""What a parameter is worth at one tensor: filters by name, gradients over the layers.

The rules are mergekit's (mergekit/config.py, ConfigReader and evaluate_setting), so that its
configs mean the same here: a filter is a plain part of the tensor's name and the first that
matches wins; a list of m numbers is interpolated linearly over the layers; tensors outside any
layer (embeddings, final norm, lm_head) take the first number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_LAYER = re.compile(r"^(.*?)\.?(\d+)\.")


def value_at(setting: Any, name: str, position: float, *, kind: str = "float") -> Any:
    """The setting's value for tensor `name` at layer position 0..1; None where no filter matches.

    A gradient of flags (`kind` "bool") is not interpolated: the value before the position counts.
    """
    if isinstance(setting, list) and setting and isinstance(setting[0], Mapping):
        for choice in setting:
            wanted = choice.get("filter")
            if wanted in (None, "*") or wanted in name:
                return value_at(choice["value"], name, position, kind=kind)
        return None
    return _gradient(setting, position, kind) if isinstance(setting, list) else setting


def _gradient(values: list[Any], position: float, kind: str) -> Any:
    at = position * (len(values) - 1)
    low = int(at)
    if kind == "bool":
        return values[low]
    high, part = min(len(values) - 1, low + 1), at - low
    return (1 - part) * values[low] + part * values[high]


def scalars(setting: Any) -> Iterator[Any]:
    """Every number or flag that stands in a setting."""
    if isinstance(setting, list):
        for item in setting:
            yield from scalars(item)
    elif isinstance(setting, Mapping):
        yield from scalars(setting.get("value"))
    elif setting is not None:
        yield setting


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
