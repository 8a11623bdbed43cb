"""Adapters that are folded into a GGUF file, with their changes by GGUF name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergeforge.adapters.deltas import LoraDelta
from mergeforge.adapters.gguf_lora import match_gguf_adapter
from mergeforge.adapters.open import Adapter
from mergeforge.checkpoints.model import ModelSource
from mergeforge.errors import SourceError
from mergeforge.planner import read_recipe
from mergeforge.planner.base_of_adapters import with_base_of_adapters
from mergeforge.planner.gguf_lora import gguf_deltas
from mergeforge.planner.gguf_source import GGUFSource
from mergeforge.planner.inputs import OpenAdapter, Opener
from mergeforge.planner.layer_replication import replicate_layers
from mergeforge.recipe import AdapterEntry


def open_adapters_for(
    source: GGUFSource, entries: Sequence[AdapterEntry], base: str | None, *, allow_pickle: bool
) -> tuple[OpenAdapter, ...]:
    """Open GGUF LoRAs, and adapters of the model `base`. Raises SourceError where one does not match the file."""
    opened = []
    for entry in entries:
        name = str(entry.adapter)
        if name.endswith(".gguf"):
            adapter = match_gguf_adapter(Path(name).expanduser(), name, source.header)
        else:
            adapter = _from_hf(name, base, source, allow_pickle=allow_pickle)
        opened.append(OpenAdapter(entry, adapter))
    return tuple(opened)


def open_with_base(adapter: str, base: str | None, *, allow_pickle: bool) -> tuple[Adapter, ModelSource]:
    """Open an adapter and its base model, which is the one that the adapter names unless it is given.

    Raises RecipeError, and SourceError if `adapter` is not an adapter.
    """
    recipe = read_recipe({"adapters": [adapter]} | ({"base_model": base} if base else {}))
    opener = Opener(replicate_layers, allow_pickle=allow_pickle)
    inputs = opener.open(with_base_of_adapters(recipe, opener))
    if inputs.base is None or not inputs.adapters:
        raise SourceError(f"{adapter} is not an adapter", hint="give the folder of a LoRA adapter")
    return inputs.adapters[0].adapter, inputs.base.checkpoint


def _from_hf(name: str, base: str | None, source: GGUFSource, *, allow_pickle: bool) -> Adapter:
    """An adapter of the Hugging Face model that the GGUF file was made from."""
    adapter, base_model = open_with_base(name, base, allow_pickle=allow_pickle)
    deltas = gguf_deltas(adapter, base_model)
    for tensor, changes in deltas.items():
        stored = source.header.tensors.get(tensor)
        if stored is None or any(isinstance(delta, LoraDelta) and delta.shape != stored.shape for delta in changes):
            text = f"{source.path} has no {tensor} of the shape that {adapter.label} changes"
            raise SourceError(text, hint="give the GGUF file of the adapter's base model")
    return replace(adapter, deltas=deltas, resized={})
