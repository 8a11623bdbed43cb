"""Layer slices: which models' layers are stacked, and which tensors are merged into each output tensor.

Whole models are one merge group. Slices are one merge group each: their layers are stacked and renumbered. The tensors
before the layers (embeddings) come from the first slice, those after them (final norm, head) from the last, as in
mergekit (mergekit/plan.py, plan_module). No table of architectures is needed: layers are found by the numbers in names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.errors import RecipeError, format_list
from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.recipe.parameter_values import layer_of, layer_positions

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
_BEFORE = re.compile(r"(^|\.)(\w*embed(?!_out)\w*|wte|wpe|shared)(\.|$)|position")
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "encoder")


@dataclass(frozen=True)
class SourceModel:
    """A model in a merge group: its own parameters, and the first of its layers there."""

    label: str
    model: ModelTensors
    parameters: Mapping[str, Any]
    first_layer: int = 0


@dataclass(frozen=True)
class MergeGroup:
    """Models that are merged tensor by tensor.

    scopes: the parameters that hold for all of them, innermost first. layer_count: layers that each source gives;
    0 for whole models.
    """

    sources: tuple[SourceModel, ...]
    base: SourceModel | None
    scopes: tuple[Mapping[str, Any], ...]
    layer_count: int = 0

    @property
    def all_sources(self) -> tuple[SourceModel, ...]:
        """The sources and the base, which may be among them."""
        return (*self.sources, *([self.base] if self.base else []))


@dataclass(frozen=True)
class OutputTensor:
    """One output tensor: its merge group, its position 0..1 along the layers, and its layer in the group (-1: none)."""

    name: str
    group: MergeGroup
    position: float
    layer: int = -1

    def name_in(self, source: SourceModel) -> str:
        """The tensor's name in a source."""
        return self.name if self.layer < 0 else with_layer(self.name, source.first_layer + self.layer)


@dataclass(frozen=True)
class LayerStack:
    """The layers of an output: the prefix of their names, and for each the model and layer it comes from."""

    prefix: str
    layers: tuple[tuple[SourceModel, int], ...]


def with_layer(name: str, index: int) -> str:
    """A tensor's name with another layer number."""
    layer = layer_of(name)
    assert layer is not None, name
    start = len(layer[0]) + 1 if layer[0] else 0
    return f"{name[:start]}{index}.{name[start:].partition('.')[2]}"


def whole_model_tensors(group: MergeGroup, names: Iterable[str]) -> Iterator[OutputTensor]:
    """Whole models: every tensor under its own name."""
    names = list(names)
    positions = layer_positions(names)
    for name in names:
        yield OutputTensor(name, group, positions[name])


def sliced_tensors(
    groups: Sequence[MergeGroup], names: Iterable[str], where: str = ""
) -> tuple[list[OutputTensor], LayerStack]:
    """The output tensors of slices: the layers that each group gives, renumbered. Raises RecipeError.

    `names`: the tensors of a model; `where`: the module of the recipe, for messages.
    """
    names = list(names)
    prefix = layer_prefix(names, groups[0].sources[0].model.config, where)
    by_layer = {id(source.model): _by_layer(source.model, prefix) for group in groups for source in group.all_sources}
    for group in groups:
        for source in group.all_sources:
            _check_range(source, group.layer_count, len(by_layer[id(source.model)]))
    outside = [name for name in names if (layer_of(name) or ("", 0))[0] != prefix]
    positions = layer_positions(outside)
    outputs = [OutputTensor(name, groups[0 if _BEFORE.search(name) else -1], positions[name]) for name in outside]
    layers: list[tuple[SourceModel, int]] = []
    for group in groups:
        first = group.sources[0]
        for layer in range(group.layer_count):
            position = layer / (group.layer_count - 1) if group.layer_count > 1 else 1.0
            layer_names = [
                name
                for source in group.sources
                for name in by_layer[id(source.model)].get(source.first_layer + layer, ())
            ]
            renumbered = dict.fromkeys(with_layer(name, len(layers)) for name in layer_names)
            outputs += [OutputTensor(name, group, position, layer) for name in renumbered]
            layers.append((first, first.first_layer + layer))
    return outputs, LayerStack(prefix, tuple(layers))


def _by_layer(model: ModelTensors, prefix: str) -> dict[int, list[str]]:
    """The names of each layer's tensors."""
    layers: dict[int, list[str]] = {}
    for name in model.tensors:
        if (layer := layer_of(name)) and layer[0] == prefix:
            layers.setdefault(layer[1], []).append(name)
    return layers


def _check_range(source: SourceModel, count: int, depth: int) -> None:
    first, stop = source.first_layer, source.first_layer + count
    if stop > depth:
        text = f"layer_range [{first}, {stop}] of {source.label} goes beyond its {depth} layers"
        raise RecipeError(text, hint=f"the last layer is {depth - 1}; the second number of layer_range is exclusive")


def layer_prefix(names: Iterable[str], config: Mapping[str, Any], where: str = "") -> str:
    """The name prefix of the layers that slices refer to: as many as the config says, and not those of another tower.

    Raises RecipeError where that does not leave exactly one stack of layers.
    """
    depths: dict[str, int] = {}
    for name in names:
        if layer := layer_of(name):
            depths[layer[0]] = max(depths.get(layer[0], 0), layer[1] + 1)
    if len(depths) > 1:
        in_config = _config_depths(config)
        depths = {prefix: depth for prefix, depth in depths.items() if depth in in_config} or depths
    if len(depths) > 1:
        main = {prefix: depth for prefix, depth in depths.items() if not any(word in prefix for word in _OTHER_TOWERS)}
        depths = main or depths
    if len(depths) != 1:
        what = f"several stacks of layers ({format_list(depths)})" if depths else "no numbered layers"
        hint = "merge whole models with 'models', or give each part its own slices under 'modules'"
        raise RecipeError(f"slices need one stack of layers, and {where or 'the model'} has {what}", hint=hint)
    return next(iter(depths))


def _config_depths(config: Mapping[str, Any]) -> set[int]:
    """The layer counts in a config."""
    inner = config.get("text_config")
    parts = [inner] if isinstance(inner, Mapping) else [config]
    return {part[key] for part in parts for key in DEPTHS if isinstance(part.get(key), int)}
