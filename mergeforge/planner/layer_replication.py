"""A model with layers repeated, as an adapter with layer_replication was trained on it.

[[0, 2], [1, 3]] makes layers 0, 1, 1, 2; the adapter's layers are numbered as these are (peft/utils/integrations,
LoraConfig.layer_replication). Every replica is written as a tensor of its own, since each gets its own change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeforge.adapters.peft import lora_config
from mergeforge.errors import SourceError
from mergeforge.planner.aux_files import files_of
from mergeforge.planner.inputs import Inputs, IntermediateModel, OpenModel
from mergeforge.planner.layer_slices import LayerStack, SourceModel, layer_prefix, with_layer
from mergeforge.planner.model_tensors import ModelTensors, renamed_tensor
from mergeforge.planner.stacked_config import stacked_config
from mergeforge.recipe.parameter_values import layer_of
from mergeforge.tensors.lazy import LazyTensor


def replicated(model: OpenModel, ranges: Sequence[Sequence[int]]) -> OpenModel:
    """The model with the layers of each range [first, stop), one range behind the other. Raises SourceError."""
    base = model.checkpoint
    prefix = layer_prefix(base.tensors, base.config)
    layers = _layers(ranges)
    places: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer, []).append(place)
    tensors: dict[str, LazyTensor] = {}
    for name, way in base.tensors.items():
        found = layer_of(name)
        if found is None or found[0] != prefix:
            tensors[name] = way
            continue
        for place in places.get(found[1], ()):
            new = with_layer(name, place)
            tensors[new] = renamed_tensor(way, new)
    held = {found[1] for name in base.tensors if (found := layer_of(name)) and found[0] == prefix}
    if lacking := sorted(set(layers) - held):
        raise SourceError(f"layer_replication repeats layer {lacking[0]}, which {model.label} has not")
    source = SourceModel(model.label, ModelTensors(model.label, base.config, base.tensors, None), {})
    stack = LayerStack(prefix, tuple((source, layer) for layer in layers))
    files, notes = files_of(base.folder)
    notes = [
        f"layer_replication: {model.label} is written with {len(layers)} layers ({list(map(list, ranges))})",
        *notes,
    ]
    result = IntermediateModel(
        base.label,
        Inputs(model, (), ()),
        tensors,
        stacked_config(base.config, [stack]),
        files,
        (*base.warnings, *notes),
    )
    return OpenModel(model.entry, result, model.adapters)


def _layers(ranges: Any) -> list[int]:
    try:
        return lora_config.replicated(ranges)
    except ValueError as error:
        raise SourceError(str(error), hint="[[first layer, layer to stop before], ...]") from None
