"""The output's tokenizer in a plan: the tensors that have a row for each token, and the files and ids that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergeforge.checkpoints.names import EMBEDDINGS, HEADS
from mergeforge.errors import RecipeError, SourceError, listing, refused_if_odd
from mergeforge.io.aux_files import AuxFiles, SideFile
from mergeforge.planner.inputs import Inputs, IntermediateModel, OpenModel
from mergeforge.planner.model_tensors import ModelTensors
from mergeforge.recipe import Recipe, TokenEntry, TokenizerEntry
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.remapped_vocab import remap_vocab
from mergeforge.tokenizer import (
    ModelToken,
    TokenizerOf,
    TokenizerPlan,
    TokenizerSettings,
    TokenSetting,
    Zero,
    chat_template,
    files_in,
    moved_ids,
    plan_tokenizer,
    with_tokenizer,
)
from mergeforge.tokenizer.hf_vocabulary import read_object
from mergeforge.tokenizer.output_files import json_file

GENERATION = "generation_config.json"


def plan_tokens(recipe: Recipe, inputs: Inputs, tables: Mapping[str, ModelTensors]) -> TokenizerPlan | None:
    """The output's tokenizer; None where the recipe leaves the donor's. Raises RecipeError or SourceError."""
    if recipe.tokenizer is None:
        return None
    merged = _merged(recipe)
    models = [
        TokenizerOf(model.label, tokenizer_files(model), _rows(tables[model.label]), model.label in merged)
        for model in _each(inputs)
    ]
    with refused_if_odd(f"the tokenizer of {listing(model.label for model in models)}"):
        return plan_tokenizer(_settings(recipe.tokenizer), models, inputs.base.label if inputs.base else None)


def template_of(recipe: Recipe, inputs: Inputs) -> str | None:
    """The output's chat template, where the recipe asks for one. Raises RecipeError or SourceError."""
    if not recipe.chat_template:
        return None
    merged = _merged(recipe)
    models = [TokenizerOf(model.label, tokenizer_files(model), 0, model.label in merged) for model in _each(inputs)]
    return chat_template(recipe.chat_template, models)


def follow(plan: TokenizerPlan, donor: OpenModel, files: AuxFiles) -> tuple[dict[str, SideFile], dict[str, Any]]:
    """The side files, with the output's tokenizer and its ids in generation_config.json, and the config's ids."""
    found = with_tokenizer(files, plan.files)
    values = read_object(found, GENERATION)
    if values and (moved := moved_ids(values, plan, donor.label)) != values:
        found[GENERATION] = json_file(GENERATION, moved)
    return found, moved_ids(donor.checkpoint.config, plan, donor.label)


def map_tables(plan: TokenizerPlan, inputs: Inputs, tables: Mapping[str, ModelTensors]) -> dict[str, ModelTensors]:
    """Every model's table with the rows of the output's tokenizer. Raises SourceError or RecipeError."""
    names = list(dict.fromkeys(name for table in tables.values() for name in table.tensors if _has_tokens(name)))
    every = {name: {label: _held(tables, label, name) for label in tables} for name in names}
    changed = {
        label: {name: remap_vocab(name, picks, every[name]) for name in names} for label, picks in plan.picks.items()
    }
    _check_adapters(inputs, tables, changed)
    return {label: replace(table, tensors={**table.tensors, **changed[label]}) for label, table in tables.items()}


def tokenizer_files(model: OpenModel) -> AuxFiles:
    """The tokenizer files of a model: its own, or those of an adapter that is folded into it and brings some."""
    found = (
        model.checkpoint.files if isinstance(model.checkpoint, IntermediateModel) else files_in(model.checkpoint.folder)
    )
    for one in model.adapters:
        found = {**found, **files_in(one.adapter.folder)}
    return found


def _each(inputs: Inputs) -> list[OpenModel]:
    """Every model once, the base where the recipe first names it."""
    every = [*inputs.models, *([inputs.base] if inputs.base else [])]
    return list({model.label: model for model in reversed(every)}.values())[::-1]


def _merged(recipe: Recipe) -> set[str]:
    """The labels of models whose weights take part; the recipe may name others for their tokens alone."""
    slices = [*recipe.slices, *(one for module in recipe.modules for one in module.slices)]
    found = [entry for list_ in recipe.lists for entry in list_]
    return {str(entry) for entry in [*found, recipe.base_model, *(one.base for one in slices)]} | {
        str(rule.use) for rule in recipe.rules
    }


def _has_tokens(name: str) -> bool:
    """Whether a tensor has a row for each token: an input embedding, a head or a head's bias."""
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    return (leaf == "weight" and last in (*EMBEDDINGS, *HEADS)) or (leaf == "bias" and last in HEADS)


def _rows(table: ModelTensors) -> int:
    found = {way.info.rows for name, way in table.tensors.items() if _has_tokens(name)}
    if len(found) != 1:
        counts = f"several numbers of rows ({listing(map(str, sorted(found)))})" if found else "no embedding"
        raise SourceError(f"{table.label} has {counts}, so its tokens have no rows that could be mapped")
    return found.pop()


def _held(tables: Mapping[str, ModelTensors], label: str, name: str) -> LazyTensor:
    way = tables[label].tensor(name)
    if way is None:
        raise SourceError(f"{label} lacks {name}, which other models have a row of for each token")
    return way


def _check_adapters(
    inputs: Inputs, tables: Mapping[str, ModelTensors], changed: Mapping[str, Mapping[str, LazyTensor]]
) -> None:
    """An adapter that is merged for itself changes rows of the base as they were."""
    base = inputs.base.label if inputs.base else ""
    for one in inputs.adapters:
        names = [name for name, way in changed[base].items() if one.adapter.edits.get(name)]
        if moved := [name for name in names if changed[base][name] is not tables[base].tensor(name)]:
            text = f"{one.adapter.label} changes {listing(moved)}, whose rows the output's tokenizer moves"
            raise RecipeError(text, hint="list it under the base model's adapters, or keep the base's tokenizer")


def _settings(entry: TokenizerEntry) -> TokenizerSettings:
    tokens = {token: _setting(one) for token, one in entry.tokens.items()}
    return TokenizerSettings(str(entry.source), tokens, entry.pad_to_multiple_of)


def _setting(entry: TokenEntry | None) -> TokenSetting:
    if entry is None:
        return TokenSetting(None)
    if entry.kind == "zero":
        return TokenSetting(Zero(), entry.force)
    if entry.kind == "model_token":
        return TokenSetting(ModelToken(str(entry.model), entry.token, entry.token_id), entry.force)
    return TokenSetting(str(entry.model), entry.force)
