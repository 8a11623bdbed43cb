"""Every output tensor, and the group of models that is merged into it: from whole models, slices or modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergeforge.checkpoints.buffers import is_buffer
from mergeforge.errors import RecipeError, format_list
from mergeforge.planner.layer_slices import (
    LayerStack,
    MergeGroup,
    OutputTensor,
    SourceModel,
    sliced_tensors,
    whole_model_tensors,
)
from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.recipe import ModelEntry, ModuleEntry, Recipe

TensorsByModel = Mapping[str, ModelTensors]
Scopes = tuple[Mapping[str, Any], ...]

# What a module is called in tensor names, where that is not its own name. The recipe's names are mergekit's
# (mergekit/_data/architectures: text_decoder, vision_tower, multi_modal_projector, encoder, decoder, shared).
_NAMES_OF_MODULES = {
    "vision_tower": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "vision_model": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "connector", "merger"),
    "audio_tower": ("audio_tower", "audio_encoder"),
}
_CATCH_ALL_MODULES = ("default", "text_decoder", "decoder")  # take what no other module's name is in, in this order


def output_tensors(
    recipe: Recipe, models: TensorsByModel, has_rule: Callable[[str], bool]
) -> tuple[list[OutputTensor], tuple[LayerStack, ...]]:
    """Every output tensor in the models' order, and the layer stacks that slices define.

    `has_rule`: whether a rule of the recipe covers a tensor, so that no module needs to. Raises RecipeError.
    """
    builder = _OutputTensorBuilder(recipe, models, has_rule)
    return list(builder.build()), tuple(builder.layer_stacks)


def merge_group(
    entries: Sequence[ModelEntry], base: ModelEntry | None, scopes: Scopes, models: TensorsByModel
) -> MergeGroup:
    """Models that are merged tensor by tensor; an unlisted base gives the layers that all others give."""
    sources = tuple(
        SourceModel(str(entry), models[str(entry)], entry.parameters, entry.layers[0] if entry.layers else 0)
        for entry in entries
    )
    count = entries[0].layers[1] - entries[0].layers[0] if entries and entries[0].layers else 0
    base_source = next((source for source in sources if source.label == str(base)), None)
    starts = {source.first_layer for source in sources}
    if base and base_source is None and len(starts) <= 1:  # otherwise nothing says which layers of the base to use
        base_source = SourceModel(str(base), models[str(base)], {}, min(starts, default=0))
    return MergeGroup(sources, base_source, scopes, count)


class _OutputTensorBuilder:
    def __init__(self, recipe: Recipe, models: TensorsByModel, has_rule: Callable[[str], bool]) -> None:
        self.recipe = recipe
        self.models = models
        self.has_rule = has_rule
        self.layer_stacks: list[LayerStack] = []

    def build(self) -> Iterator[OutputTensor]:
        """Every output tensor, in the models' order."""
        recipe = self.recipe
        if not recipe.modules:
            yield from self._tensors_of(recipe, self._names(recipe), ())
            return
        modules = {module.name: module for module in recipe.modules}
        names = {name: None for module in recipe.modules for name in self._names(module)}
        module_names = {name: module_of(name, modules) for name in names}
        unassigned = [name for name, module in module_names.items() if module is None]
        if uncovered := [name for name in unassigned if not self.has_rule(name)]:
            text = f"{format_list(uncovered)} belong to none of the modules {format_list(modules)}"
            raise RecipeError(text, hint="add a module for them, or a rule: {match: ..., use: base}")
        for module_name, module in modules.items():
            inside = [name for name, owner in module_names.items() if owner == module_name]
            yield from self._tensors_of(module, inside, (module.parameters,), f"the module {module_name!r}")
        yield from whole_model_tensors(merge_group((), None, (recipe.parameters,), self.models), unassigned)

    def _names(self, part: Recipe | ModuleEntry) -> list[str]:
        """The tensors of every model that a part of the recipe merges, and of the base model."""
        entries = [*part.models, *(source for layers in part.slices for source in layers.sources)]
        if self.recipe.base_model and not part.slices:
            entries.insert(0, self.recipe.base_model)
        return list(dict.fromkeys(name for entry in entries for name in self.models[str(entry)].tensors))

    def _tensors_of(
        self, part: Recipe | ModuleEntry, names: Sequence[str], scopes: Scopes, where: str = ""
    ) -> list[OutputTensor]:
        base, scopes = self.recipe.base_model, (*scopes, self.recipe.parameters)
        if not part.slices:
            return list(whole_model_tensors(merge_group(part.models, base, scopes, self.models), names))
        groups = [
            merge_group(layers.sources, layers.base or base, (layers.parameters, *scopes), self.models)
            for layers in part.slices
        ]
        outputs, stack = sliced_tensors(groups, names, where)
        self.layer_stacks.append(stack)
        return outputs


def is_buffer_of_some(output: OutputTensor) -> bool:
    """Whether a tensor is a buffer that some models of its group store and others do not."""
    tensors = [source.model.tensor(output.name_in(source)) for source in output.group.all_sources]
    shapes = [tensor.info.shape for tensor in tensors if tensor]
    if not 0 < len(shapes) < len(tensors):
        return False
    return is_buffer(output.name, shapes[0], str(output.group.sources[0].model.config.get("model_type")))


def module_of(name: str, modules: Iterable[str]) -> str | None:
    """The module, of those given, that a tensor belongs to by its name; None if it belongs to none.

    Inner modules win: visual.merger belongs to the projector.
    """
    modules = list(modules)
    parts = name.split(".")
    depths = {module: _depth(module, parts) for module in modules}
    deepest = max(depths, key=lambda module: depths[module])
    if depths[deepest] >= 0:
        return deepest
    known = {part for names in _NAMES_OF_MODULES.values() for part in names}
    if known & set(parts) or ("encoder" in parts and "decoder" in modules):
        return None  # it belongs to a module that the recipe does not name
    return next((module for module in _CATCH_ALL_MODULES if module in modules), None)


def _depth(module: str, parts: list[str]) -> int:
    """Position of the last part of a tensor name that is a name of the module; -1 if there is none."""
    names = _NAMES_OF_MODULES.get(module, (module,))
    return max((position for position, part in enumerate(parts) if part in names), default=-1)
