"""A model with layers repeated, as an adapter with layer_replication was trained on it.

[[0, 2], [1, 3]] gives layers 0, 1, 1, 2, and the adapter numbers its layers in this way (peft/utils/integrations,
LoraConfig.layer_replication). Every replica is written as a tensor of its own, because each gets its own delta.
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


def replicate_layers(model: OpenModel, ranges: Sequence[Sequence[int]]) -> OpenModel:
    """The model with the layers of each range [first, stop), one range after the other. Raises SourceError."""
    base = model.checkpoint
    prefix = layer_prefix(base.tensors, base.config)
    layers = _layers(ranges)
    new_numbers: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        new_numbers.setdefault(layer, []).append(number)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in base.tensors.items():
        layer_name = layer_of(name)
        if layer_name is None or layer_name[0] != prefix:
            tensors[name] = tensor
            continue
        for number in new_numbers.get(layer_name[1], ()):
            new_name = with_layer(name, number)
            tensors[new_name] = renamed_tensor(tensor, new_name)
    existing = {found[1] for name in base.tensors if (found := layer_of(name)) and found[0] == prefix}
    if missing := sorted(set(layers) - existing):
        raise SourceError(f"layer_replication repeats layer {missing[0]}, which {model.label} does not have")
    source = SourceModel(model.label, ModelTensors(model.label, base.config, base.tensors), {})
    stack = LayerStack(prefix, tuple((source, layer) for layer in layers))
    files, notes = files_of(base)
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
        return lora_config.replicated_layers(ranges)
    except ValueError as error:
        raise SourceError(str(error), hint="[[first layer, layer to stop before], ...]") from None
