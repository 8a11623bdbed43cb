"""Sections: which models' tensors are merged into each output tensor.

Whole models are one section. Slices are one section each: their layers are stacked one on the other
and renumbered, and what stands before the layers (embeddings) comes from the first slice, what stands
behind them (final norm, head) from the last, as in mergekit (mergekit/plan.py, plan_module). Nothing
is known of architectures: layers are found by the numbers in names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.errors import RecipeError, listing
from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.recipe.parameter_values import layer_of, layer_positions

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
_BEFORE = re.compile(r"(^|\.)(\w*embed(?!_out)\w*|wte|wpe|shared)(\.|$)|position")
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "encoder")


@dataclass(frozen=True)
class SourceModel:
    """A model as it stands in a section: its own parameters, and the first of its layers there."""

    label: str
    model: ModelTensors
    parameters: Mapping[str, Any]
    first_layer: int = 0


@dataclass(frozen=True)
class MergeGroup:
    """Models that are merged tensor by tensor; `scopes`: the parameters that hold for all, inner first.

    `count`: layers that each source gives; 0: whole models.
    """

    sources: tuple[SourceModel, ...]
    base: SourceModel | None
    scopes: tuple[Mapping[str, Any], ...]
    layer_count: int = 0

    @property
    def every(self) -> tuple[SourceModel, ...]:
        """The base too, listed or not."""
        return (*self.sources, *([self.base] if self.base else []))


@dataclass(frozen=True)
class OutputTensor:
    """One output tensor: its section, its place 0..1 along the layers, and its layer in the section (-1: none)."""

    name: str
    group: MergeGroup
    position: float
    layer: int = -1

    def name_in(self, source: SourceModel) -> str:
        """What the tensor is called in a source."""
        return self.name if self.layer < 0 else with_layer(self.name, source.first_layer + self.layer)


@dataclass(frozen=True)
class LayerStack:
    """The layers of an output: the prefix of their names, and whose layer each one is."""

    prefix: str
    layers: tuple[tuple[SourceModel, int], ...]


def with_layer(name: str, index: int) -> str:
    """A tensor's name with another number for its layer."""
    found = layer_of(name)
    assert found is not None, name
    start = len(found[0]) + 1 if found[0] else 0
    return f"{name[:start]}{index}.{name[start:].partition('.')[2]}"


def whole_model_tensors(section: MergeGroup, names: Iterable[str]) -> Iterator[OutputTensor]:
    """Whole models: every tensor under its own name."""
    names = list(names)
    positions = layer_positions(names)
    for name in names:
        yield OutputTensor(name, section, positions[name])


def sliced_tensors(
    sections: Sequence[MergeGroup], names: Iterable[str], where: str = ""
) -> tuple[list[OutputTensor], LayerStack]:
    """Slices: the layers of `names` that each section gives, renumbered. Raises RecipeError.

    `names`: the tensors of a model; `where`: the module of the recipe, for messages.
    """
    names = list(names)
    prefix = layer_prefix(names, sections[0].sources[0].model.config, where)
    layered = {id(one.model): _by_layer(one.model, prefix) for section in sections for one in section.every}
    for section in sections:
        for source in section.every:
            _check_range(source, section.layer_count, len(layered[id(source.model)]))
    outside = [name for name in names if (layer_of(name) or ("", 0))[0] != prefix]
    positions = layer_positions(outside)
    spots = [OutputTensor(name, sections[0 if _BEFORE.search(name) else -1], positions[name]) for name in outside]
    layers: list[tuple[SourceModel, int]] = []
    for section in sections:
        first = section.sources[0]
        for at in range(section.layer_count):
            position = at / (section.layer_count - 1) if section.layer_count > 1 else 1.0
            inside = [name for one in section.sources for name in layered[id(one.model)].get(one.first_layer + at, ())]
            numbered = dict.fromkeys(with_layer(name, len(layers)) for name in inside)
            spots += [OutputTensor(name, section, position, at) for name in numbered]
            layers.append((first, first.first_layer + at))
    return spots, LayerStack(prefix, tuple(layers))


def _by_layer(table: ModelTensors, prefix: str) -> dict[int, list[str]]:
    """The names of each layer's tensors."""
    layers: dict[int, list[str]] = {}
    for name in table.tensors:
        if (found := layer_of(name)) and found[0] == prefix:
            layers.setdefault(found[1], []).append(name)
    return layers


def _check_range(source: SourceModel, count: int, depth: int) -> None:
    if source.first_layer + count > depth:
        text = f"layer_range [{source.first_layer}, {source.first_layer + count}] of {source.label} goes beyond its {depth} layers"
        raise RecipeError(text, hint=f"the last layer is {depth - 1}; layer_range ends before its second number")


def layer_prefix(names: Iterable[str], config: Mapping[str, Any], where: str = "") -> str:
    """The prefix of the layers that slices speak of: as deep as the config says, and no other tower's.

    Raises RecipeError where that is not one stack of layers.
    """
    depths: dict[str, int] = {}
    for name in names:
        if found := layer_of(name):
            depths[found[0]] = max(depths.get(found[0], 0), found[1] + 1)
    if len(depths) > 1:
        told = _config_depths(config)
        depths = {prefix: depth for prefix, depth in depths.items() if depth in told} or depths
    if len(depths) > 1:
        plain = {one: depth for one, depth in depths.items() if not any(word in one for word in _OTHER_TOWERS)}
        depths = plain or depths
    if len(depths) != 1:
        what = f"several stacks of layers ({listing(depths)})" if depths else "no numbered layers"
        hint = "merge whole models with 'models', or give each part its own slices under 'modules'"
        raise RecipeError(f"slices need one stack of layers, and {where or 'the model'} has {what}", hint=hint)
    return next(iter(depths))


def _config_depths(config: Mapping[str, Any]) -> set[int]:
    """The numbers of layers that a config tells."""
    inner = config.get("text_config")
    parts = [inner] if isinstance(inner, Mapping) else [config]
    return {part[key] for part in parts for key in DEPTHS if isinstance(part.get(key), int)}
