"""Recipes: the description of a merge, read strictly from YAML or a dict.

A recipe has mergekit's keys, plus `adapters`, `rules` and `output`. Several documents in one file are merges that
use each other's results by name. Reading needs neither torch nor the models, and
reports every mistake of a file at once, each with its line and column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from mergeforge.errors import Problem, RecipeError
from mergeforge.recipe import yaml_reader
from mergeforge.recipe.keys import RECIPE, json_schema
from mergeforge.recipe.method_parameters import MethodSignature
from mergeforge.recipe.model import (
    OUT_DTYPES,
    AdapterEntry,
    AdapterOutput,
    GGUFEntry,
    ModelEntry,
    ModelRef,
    ModuleEntry,
    Output,
    Publish,
    Recipe,
    Rule,
    Slice,
    TokenEntry,
    TokenizerEntry,
    to_yaml,
)
from mergeforge.recipe.overrides import apply_override, plain_value, read_recipe_file
from mergeforge.recipe.validator import KnownNames, Validator

__all__ = [
    "OUT_DTYPES",
    "AdapterEntry",
    "AdapterOutput",
    "GGUFEntry",
    "ModelEntry",
    "ModelRef",
    "ModuleEntry",
    "Output",
    "Publish",
    "Recipe",
    "Rule",
    "Slice",
    "TokenEntry",
    "TokenizerEntry",
    "json_schema",
    "read",
    "to_yaml",
]


def read(
    source: str | FilePath | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe,
    methods: Mapping[str, MethodSignature] | Any,
    overrides: tuple[str, ...] = (),
    gguf_types: KnownNames = (),
) -> Recipe:
    """Read a recipe from a file, a dict (or list of dicts: its documents) or a Recipe.

    `methods`: the known merge methods. `overrides`: PATH=VALUE overrides (`--set`) of the document that gives the
    result. `gguf_types`: the known GGUF types.

    Raises RecipeError with every mistake, and TypeError for anything else.
    """
    if isinstance(source, Recipe):
        source = source.documents
    name = "the recipe"
    if isinstance(source, Mapping):
        documents: list[yaml_reader.ParsedDocument] = [(plain_value(source), {}, [])]
    elif isinstance(source, str | FilePath):
        name = str(source)
        documents = yaml_reader.parse(read_recipe_file(FilePath(source)), name)
    elif isinstance(source, Sequence):
        documents = [(plain_value(document), {}, []) for document in source]
    else:
        text = "a recipe is a file, a dict, a list of dicts or a mergeforge.Recipe"
        raise TypeError(f"{text}, not {type(source).__name__}")
    final = _final_document([value for value, _, _ in documents])
    for value, _, _ in documents:
        _refuse_mixture_of_experts(value, name)
    for override in overrides:
        value, positions, problems = documents[final]
        documents[final] = apply_override(value, override, RECIPE), positions, problems
    recipes, mistakes = _read_all(documents, methods, gguf_types)
    if mistakes:
        raise RecipeError(f"{name} has mistakes:", problems=_known_keys_once(sorted(set(mistakes))))
    result = recipes.pop(final)
    return replace(result, stages=tuple(recipes)) if recipes else result


def _known_keys_once(mistakes: Sequence[Problem]) -> list[Problem]:
    """The mistakes, without a list of names (`known keys: ...`) that an earlier one has in its hint."""
    lists: set[str] = set()
    shown = []
    for mistake in mistakes:
        shown.append(replace(mistake, hint="") if mistake.hint in lists else mistake)
        lists |= {mistake.hint} if mistake.hint.startswith("known") else set()
    return shown


def _refuse_mixture_of_experts(document: Any, name: str) -> None:
    """A config of mergekit-moe is no recipe, though it looks like one with mistakes in every line."""
    if isinstance(document, Mapping) and "experts" in document:
        text = "it describes a mixture of experts, made of dense models"
        hint = "`mergeforge moe` is to do that, but there is no such command yet; mergekit-moe has it"
        raise RecipeError(f"{name} is not a recipe of a merge", hint=hint, problems=[Problem(0, 0, text)])


def _read_all(
    documents: Sequence[yaml_reader.ParsedDocument], methods: Mapping[str, MethodSignature], gguf_types: KnownNames
) -> tuple[list[Recipe], list[Problem]]:
    """Read every document; return the recipes and all mistakes."""
    recipes: list[Recipe] = []
    mistakes: list[Problem] = []
    names: set[Any] = set()
    final = _final_document([value for value, _, _ in documents])
    for index, (value, positions, problems) in enumerate(documents):
        validator = Validator(positions, problems)
        checked_value = RECIPE.read(value, (), validator.report)
        recipe = validator.recipe(checked_value, value, methods)
        validator.check_gguf(checked_value, gguf_types)
        if index != final:
            validator.check_stage(checked_value, names)
        mistakes += validator.problems
        if recipe is not None:
            recipes.append(recipe)
        names.add(checked_value.get("name"))
    return recipes, mistakes


def _final_document(documents: Sequence[Any]) -> int:
    """The index of the document that gives the result: the one without a name, else the last."""
    unnamed = [
        index for index, value in enumerate(documents) if isinstance(value, Mapping) and value.get("name") is None
    ]
    return unnamed[-1] if unnamed else len(documents) - 1
