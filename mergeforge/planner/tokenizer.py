"""The output's tokenizer in a plan: the tensors that have a row for each token, and the files and ids that change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import HEADS
from mergeforge.checkpoints.ties import model_ties
from mergeforge.errors import RecipeError, SourceError, format_list, malformed_as_source_error
from mergeforge.io.aux_files import AuxFile, AuxFiles
from mergeforge.planner.inputs import Inputs, IntermediateModel, OpenModel
from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.recipe import Recipe, TokenEntry, TokenizerEntry
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.remapped_vocab import remap_vocab
from mergeforge.tokenizer import (
    ModelToken,
    ModelTokenizer,
    TokenizerPlan,
    TokenizerSettings,
    TokenSetting,
    Zero,
    chat_template,
    plan_tokenizer,
    remap_special_ids,
    replace_tokenizer_files,
    tokenizer_files_in,
)
from mergeforge.tokenizer.hf_files import read_object
from mergeforge.tokenizer.output_files import is_tokenizer_file, json_file

GENERATION = "generation_config.json"


def plan_output_tokenizer(recipe: Recipe, inputs: Inputs, models: Mapping[str, ModelTensors]) -> TokenizerPlan | None:
    """The output's tokenizer; None where the reference model's is kept. Raises RecipeError or SourceError."""
    if recipe.tokenizer is None:
        return None
    merged, names = _merged(recipe), _token_names(inputs, models)
    tokenizers = [
        ModelTokenizer(model.label, tokenizer_files(model), _rows(models[model.label], names), model.label in merged)
        for model in _models_in_order(inputs)
    ]
    with malformed_as_source_error(f"the tokenizer of {format_list(tokenizer.label for tokenizer in tokenizers)}"):
        return plan_tokenizer(_settings(recipe.tokenizer), tokenizers, inputs.base.label if inputs.base else None)


def output_chat_template(recipe: Recipe, inputs: Inputs) -> str | None:
    """The output's chat template; None where the recipe does not set one. Raises RecipeError or SourceError."""
    if not recipe.chat_template:
        return None
    merged = _merged(recipe)
    models = [
        ModelTokenizer(model.label, tokenizer_files(model), 0, model.label in merged)
        for model in _models_in_order(inputs)
    ]
    return chat_template(recipe.chat_template, models)


def with_output_tokenizer(
    plan: TokenizerPlan, reference: OpenModel, files: AuxFiles
) -> tuple[dict[str, AuxFile], dict[str, Any]]:
    """The files beside the weights and the config, with the output's tokenizer and its token ids."""
    new_files = replace_tokenizer_files(files, plan.files)
    generation = read_object(new_files, GENERATION)
    if generation and (remapped := remap_special_ids(generation, plan, reference.label)) != generation:
        new_files[GENERATION] = json_file(GENERATION, remapped)
    return new_files, remap_special_ids(reference.checkpoint.config, plan, reference.label)


def remap_models(plan: TokenizerPlan, inputs: Inputs, models: Mapping[str, ModelTensors]) -> dict[str, ModelTensors]:
    """Every model's tensors with the rows of the output's tokenizer. Raises SourceError or RecipeError."""
    names = _token_names(inputs, models)
    by_model = {name: {label: _token_tensor(models, label, name) for label in models} for name in names}
    remapped = {
        label: {name: remap_vocab(name, row_sources, by_model[name]) for name in names}
        for label, row_sources in plan.row_sources.items()
    }
    _check_adapters(inputs, models, remapped)
    return {label: replace(model, tensors={**model.tensors, **remapped[label]}) for label, model in models.items()}


def tokenizer_files(model: OpenModel) -> AuxFiles:
    """The tokenizer files of a model: its own, or those of an adapter that is folded into it."""
    checkpoint = model.checkpoint
    files = dict(_own_tokenizer_files(checkpoint))
    for opened in model.adapters:
        files |= tokenizer_files_in(opened.adapter.folder)
    return files


def _own_tokenizer_files(checkpoint: ModelSource) -> AuxFiles:
    if isinstance(checkpoint, IntermediateModel):
        return checkpoint.files
    if isinstance(checkpoint, Checkpoint) and checkpoint.own_files is not None:
        return {name: file for name, file in checkpoint.own_files.items() if is_tokenizer_file(name)}
    return tokenizer_files_in(checkpoint.folder)


def merged_models(recipe: Recipe, inputs: Inputs) -> list[OpenModel]:
    """The models whose weights are merged, each once; the recipe may name others for their tokens only."""
    labels = _merged(recipe)
    return [model for model in _models_in_order(inputs) if model.label in labels]


def _models_in_order(inputs: Inputs) -> list[OpenModel]:
    """Every model once, the base where the recipe first names it."""
    models = [*inputs.models, *([inputs.base] if inputs.base else [])]
    return list({model.label: model for model in reversed(models)}.values())[::-1]


def _merged(recipe: Recipe) -> set[str]:
    """The labels of the models whose weights are merged; the recipe may name others for their tokens only."""
    slices = [*recipe.slices, *(layers for module in recipe.modules for layers in module.slices)]
    entries = [entry for models in recipe.model_lists for entry in models]
    entries += [entry for entry in (recipe.base_model, *(layers.base for layers in slices)) if entry]
    return {*map(str, entries), *(str(rule.use) for rule in recipe.rules if rule.use)}


def _token_names(inputs: Inputs, models: Mapping[str, ModelTensors]) -> list[str]:
    """The names of all tensors with a row for each token: embeddings, heads and their biases."""
    names: dict[str, None] = {}
    for model in _models_in_order(inputs):
        ties = model_ties(model.checkpoint)
        tensors = models[model.label].tensors
        names |= dict.fromkeys(name for name in tensors if ties.has_token_rows(name) or _is_head_bias(name))
    return list(names)


def _is_head_bias(name: str) -> bool:
    return name.endswith(".bias") and name.split(".")[-2] in HEADS


def _rows(model: ModelTensors, names: Collection[str]) -> int:
    counts = {tensor.info.rows for name, tensor in model.tensors.items() if name in names}
    if len(counts) != 1:
        sizes = format_list(map(str, sorted(counts)))
        text = f"embeddings of different sizes ({sizes} rows)" if counts else "no embedding"
        raise SourceError(f"{model.label} has {text}, so its tokens cannot be mapped to rows")
    return counts.pop()


def _token_tensor(models: Mapping[str, ModelTensors], label: str, name: str) -> LazyTensor:
    tensor = models[label].tensor(name)
    if tensor is None:
        raise SourceError(f"{label} lacks {name}, which has a row for each token in the other models")
    return tensor


def _check_adapters(
    inputs: Inputs, models: Mapping[str, ModelTensors], remapped: Mapping[str, Mapping[str, LazyTensor]]
) -> None:
    """Raise RecipeError for a top-level adapter that changes tensors whose rows the output's tokenizer moves."""
    base = inputs.base.label if inputs.base else ""
    for adapter in (opened.adapter for opened in inputs.adapters):
        names = [name for name in remapped[base] if adapter.deltas.get(name)]
        if moved := [name for name in names if remapped[base][name] is not models[base].tensor(name)]:
            text = f"{adapter.label} changes {format_list(moved)}, whose rows the output's tokenizer moves"
            raise RecipeError(text, hint="list it under the base model's own adapters, or keep the base's tokenizer")


def _settings(entry: TokenizerEntry) -> TokenizerSettings:
    tokens = {token: _setting(token_entry) for token, token_entry in entry.tokens.items()}
    return TokenizerSettings(str(entry.source), tokens, entry.pad_to_multiple_of)


def _setting(entry: TokenEntry | None) -> TokenSetting:
    if entry is None:
        return TokenSetting(None)
    if entry.kind == "zero":
        return TokenSetting(Zero(), entry.force)
    if entry.kind == "model_token":
        return TokenSetting(ModelToken(str(entry.model), entry.token, entry.token_id), entry.force)
    return TokenSetting(str(entry.model), entry.force)
