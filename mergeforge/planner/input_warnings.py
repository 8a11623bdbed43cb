"""Warnings about inputs: adapters without effect, mixed dtypes, a missing tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from mergeforge.adapters.zero_factors import changes_nothing
from mergeforge.checkpoints.model import ModelSource
from mergeforge.core.messages import WarningText
from mergeforge.core.tensor_info import DTYPES
from mergeforge.io.aux_files import AuxFiles
from mergeforge.planner.inputs import Inputs
from mergeforge.recipe import Recipe
from mergeforge.tokenizer.output_files import is_tokenizer_file


def input_warnings(recipe: Recipe, inputs: Inputs, files: AuxFiles) -> Iterator[WarningText]:
    """All warnings about the inputs of one document. `files`: those beside the weights of its output."""
    yield from _adapters_without_effect(inputs)
    if recipe.dtype is None and recipe.out_dtype is None:
        yield from _mixed_dtypes(inputs)
    config = inputs.reference_model.checkpoint.config
    if _has_vocabulary(config) and not any(map(is_tokenizer_file, files)):
        label = inputs.reference_model.label
        yield WarningText(f"{label} has no tokenizer files, so the output has none")


def _adapters_without_effect(inputs: Inputs) -> Iterator[WarningText]:
    for opened in inputs.opened_adapters:
        label = opened.adapter.label
        if opened.entry.weight == 0:
            yield WarningText(f"{label} has weight 0: it changes nothing")
        elif not (opened.adapter.deltas or opened.adapter.resized or opened.adapter.added):
            yield WarningText(f"{label} changes nothing: none of its modules has a trained part")
        elif changes_nothing(opened.adapter):
            yield WarningText(f"{label} changes nothing: one LoRA factor of every module is zero (was it trained?)")


def _mixed_dtypes(inputs: Inputs) -> Iterator[WarningText]:
    """Models are written in the reference model's dtypes, whatever the dtypes of the others."""
    reference = inputs.reference_model
    expected = _main_dtype(reference.checkpoint)
    for model in inputs.models:
        dtype = _main_dtype(model.checkpoint)
        if dtype and expected and dtype != expected:
            names = f"{model.label} is {DTYPES[dtype][1]}, {reference.label} is {DTYPES[expected][1]}"
            yield WarningText(f"{names}: the output is {DTYPES[expected][1]}, unless the recipe sets dtype")


def _main_dtype(model: ModelSource) -> str:
    """The dtype of most of a model's floating-point bytes."""
    sizes: Counter[str] = Counter()
    for tensor in model.tensors.values():
        sizes[tensor.info.dtype] += tensor.info.nbytes if tensor.info.is_float else 0
    return sizes.most_common(1)[0][0] if sizes else ""


def _has_vocabulary(config: Mapping[str, object]) -> bool:
    inner = config.get("text_config")
    return "vocab_size" in config or (isinstance(inner, Mapping) and "vocab_size" in inner)
