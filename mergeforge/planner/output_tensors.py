"""From a recipe's models, slices or modules to spots: every output tensor, and the section that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mergeforge.errors import RecipeError, listing
from mergeforge.planner.layer_slices import (
    LayerStack,
    MergeGroup,
    OutputTensor,
    SourceModel,
    sliced_tensors,
    whole_model_tensors,
)
from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.planner.modules import module_of
from mergeforge.recipe import ModelEntry, Module, Recipe

TensorsByModel = Mapping[str, ModelTensors]
Scopes = tuple[Mapping[str, Any], ...]


def output_tensors(
    recipe: Recipe, tables: TensorsByModel, has_rule: Callable[[str], bool]
) -> tuple[list[OutputTensor], tuple[LayerStack, ...]]:
    """Every output tensor in the models' order, and the stacks of layers that slices make.

    `has_rule`: whether a rule of the recipe speaks of a tensor, so that no module need do so. Raises RecipeError.
    """
    spotter = _OutputTensorBuilder(recipe, tables, has_rule)
    return list(spotter.build()), tuple(spotter.stacks)


def merge_group(
    entries: Sequence[ModelEntry], base: ModelEntry | None, scopes: Scopes, tables: TensorsByModel
) -> MergeGroup:
    """Models that are merged tensor by tensor; an unlisted base gives the layers that all others give."""
    sources = tuple(
        SourceModel(str(entry), tables[str(entry)], entry.parameters, entry.layers[0] if entry.layers else 0)
        for entry in entries
    )
    count = entries[0].layers[1] - entries[0].layers[0] if entries and entries[0].layers else 0
    base_source = next((source for source in sources if source.label == str(base)), None)
    starts = {source.first_layer for source in sources}
    if base and base_source is None and len(starts) <= 1:  # else its layers are not told
        base_source = SourceModel(str(base), tables[str(base)], {}, min(starts, default=0))
    return MergeGroup(sources, base_source, scopes, count)


class _OutputTensorBuilder:
    def __init__(self, recipe: Recipe, tables: TensorsByModel, has_rule: Callable[[str], bool]) -> None:
        self.recipe = recipe
        self.tables = tables
        self.has_rule = has_rule
        self.stacks: list[LayerStack] = []

    def build(self) -> Iterator[OutputTensor]:
        """Every output tensor and the section that it belongs to, in the models' order."""
        recipe = self.recipe
        if not recipe.modules:
            yield from self._tensors_of(recipe, self._names(recipe), ())
            return
        parts = {module.name: module for module in recipe.modules}
        names = {name: None for module in recipe.modules for name in self._names(module)}
        belongs = {name: module_of(name, parts) for name in names}
        if homeless := [name for name, part in belongs.items() if part is None and not self.has_rule(name)]:
            text = f"{listing(homeless)} belong to none of the modules {listing(parts)}"
            raise RecipeError(text, hint="add a module for them, or a rule: {match: ..., use: base}")
        for name, module in parts.items():
            inside = [one for one, part in belongs.items() if part == name]
            yield from self._tensors_of(module, inside, (module.parameters,), f"the module {name!r}")
        outside = [one for one, part in belongs.items() if part is None]
        yield from whole_model_tensors(merge_group((), None, (recipe.parameters,), self.tables), outside)

    def _names(self, part: Recipe | Module) -> list[str]:
        """The tensors of every model that a part of the recipe merges, and of the base model."""
        entries = [*part.models, *(source for one in part.slices for source in one.sources)]
        if self.recipe.base_model and not part.slices:
            entries.insert(0, self.recipe.base_model)
        return list(dict.fromkeys(name for entry in entries for name in self.tables[str(entry)].tensors))

    def _tensors_of(
        self, part: Recipe | Module, names: Sequence[str], scopes: Scopes, where: str = ""
    ) -> list[OutputTensor]:
        base, own = self.recipe.base_model, (*scopes, self.recipe.parameters)
        if not part.slices:
            return list(whole_model_tensors(merge_group(part.models, base, own, self.tables), names))
        sections = [
            merge_group(one.sources, one.base or base, (one.parameters, *own), self.tables) for one in part.slices
        ]
        spots, stack = sliced_tensors(sections, names, where)
        self.stacks.append(stack)
        return spots
