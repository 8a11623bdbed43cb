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
from mergeforge.planner.model_tensors import Table
from mergeforge.recipe.parameter_values import layer_of, layer_positions

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
_BEFORE = re.compile(r"(^|\.)(\w*embed(?!_out)\w*|wte|wpe|shared)(\.|$)|position")
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "encoder")


@dataclass(frozen=True)
class Source:
    """A model as it stands in a section: its own parameters, and the first of its layers there."""

    label: str
    table: Table
    parameters: Mapping[str, Any]
    first: int = 0


@dataclass(frozen=True)
class Section:
    """Models that are merged tensor by tensor; `scopes`: the parameters that hold for all, inner first.

    `count`: layers that each source gives; 0: whole models.
    """

    sources: tuple[Source, ...]
    base: Source | None
    scopes: tuple[Mapping[str, Any], ...]
    count: int = 0

    @property
    def every(self) -> tuple[Source, ...]:
        """The base too, listed or not."""
        return (*self.sources, *([self.base] if self.base else []))


@dataclass(frozen=True)
class Spot:
    """One output tensor: its section, its place 0..1 along the layers, and its layer in the section (-1: none)."""

    name: str
    section: Section
    position: float
    layer: int = -1

    def name_in(self, source: Source) -> str:
        """What the tensor is called in a source."""
        return self.name if self.layer < 0 else with_layer(self.name, source.first + self.layer)


@dataclass(frozen=True)
class Stack:
    """The layers of an output: the prefix of their names, and whose layer each one is."""

    prefix: str
    layers: tuple[tuple[Source, int], ...]


def with_layer(name: str, index: int) -> str:
    """A tensor's name with another number for its layer."""
    found = layer_of(name)
    assert found is not None, name
    start = len(found[0]) + 1 if found[0] else 0
    return f"{name[:start]}{index}.{name[start:].partition('.')[2]}"


def whole_spots(section: Section, names: Iterable[str]) -> Iterator[Spot]:
    """Whole models: every tensor under its own name."""
    names = list(names)
    positions = layer_positions(names)
    for name in names:
        yield Spot(name, section, positions[name])


def stacked_spots(sections: Sequence[Section], names: Iterable[str], where: str = "") -> tuple[list[Spot], Stack]:
    """Slices: the layers of `names` that each section gives, renumbered. Raises RecipeError.

    `names`: the tensors of a model; `where`: the module of the recipe, for messages.
    """
    names = list(names)
    prefix = main_stack(names, sections[0].sources[0].table.config, where)
    layered = {id(one.table): _by_layer(one.table, prefix) for section in sections for one in section.every}
    for section in sections:
        for source in section.every:
            _check_range(source, section.count, len(layered[id(source.table)]))
    outside = [name for name in names if (layer_of(name) or ("", 0))[0] != prefix]
    positions = layer_positions(outside)
    spots = [Spot(name, sections[0 if _BEFORE.search(name) else -1], positions[name]) for name in outside]
    layers: list[tuple[Source, int]] = []
    for section in sections:
        first = section.sources[0]
        for at in range(section.count):
            position = at / (section.count - 1) if section.count > 1 else 1.0
            inside = [name for one in section.sources for name in layered[id(one.table)].get(one.first + at, ())]
            numbered = dict.fromkeys(with_layer(name, len(layers)) for name in inside)
            spots += [Spot(name, section, position, at) for name in numbered]
            layers.append((first, first.first + at))
    return spots, Stack(prefix, tuple(layers))


def _by_layer(table: Table, prefix: str) -> dict[int, list[str]]:
    """The names of each layer's tensors."""
    layers: dict[int, list[str]] = {}
    for name in table.ways:
        if (found := layer_of(name)) and found[0] == prefix:
            layers.setdefault(found[1], []).append(name)
    return layers


def _check_range(source: Source, count: int, depth: int) -> None:
    if source.first + count > depth:
        text = f"layer_range [{source.first}, {source.first + count}] of {source.label} goes beyond its {depth} layers"
        raise RecipeError(text, hint=f"the last layer is {depth - 1}; layer_range ends before its second number")


def main_stack(names: Iterable[str], config: Mapping[str, Any], where: str = "") -> str:
    """The prefix of the layers that slices speak of: as deep as the config says, and no other tower's.

    Raises RecipeError where that is not one stack of layers.
    """
    depths: dict[str, int] = {}
    for name in names:
        if found := layer_of(name):
            depths[found[0]] = max(depths.get(found[0], 0), found[1] + 1)
    if len(depths) > 1:
        told = _told_depths(config)
        depths = {prefix: depth for prefix, depth in depths.items() if depth in told} or depths
    if len(depths) > 1:
        plain = {one: depth for one, depth in depths.items() if not any(word in one for word in _OTHER_TOWERS)}
        depths = plain or depths
    if len(depths) != 1:
        what = f"several stacks of layers ({listing(depths)})" if depths else "no numbered layers"
        hint = "merge whole models with 'models', or give each part its own slices under 'modules'"
        raise RecipeError(f"slices need one stack of layers, and {where or 'the model'} has {what}", hint=hint)
    return next(iter(depths))


def _told_depths(config: Mapping[str, Any]) -> set[int]:
    """The numbers of layers that a config tells."""
    inner = config.get("text_config")
    parts = [inner] if isinstance(inner, Mapping) else [config]
    return {part[key] for part in parts for key in DEPTHS if isinstance(part.get(key), int)}
