"""Recipe: what a merge is to do, read strictly from YAML or a dict.

mergekit's keys, plus `adapters`, `rules` and `output`. Several documents in one file are merges that
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
from mergeforge.recipe.model import (
    OUT_DTYPES,
    AdapterEntry,
    AdapterOutput,
    GGUFEntry,
    ModelEntry,
    ModelRef,
    Module,
    Output,
    Publish,
    Recipe,
    Rule,
    Slice,
    TokenEntry,
    TokenizerEntry,
)
from mergeforge.recipe.overrides import file_text, overridden, plain
from mergeforge.recipe.validator import WITHOUT_EFFECT, Checker, Known, Method

__all__ = [
    "OUT_DTYPES",
    "WITHOUT_EFFECT",
    "AdapterEntry",
    "AdapterOutput",
    "GGUFEntry",
    "ModelEntry",
    "ModelRef",
    "Module",
    "Output",
    "Publish",
    "Recipe",
    "Rule",
    "Slice",
    "TokenEntry",
    "TokenizerEntry",
    "json_schema",
    "read",
]


def read(
    source: str | FilePath | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe,
    methods: Mapping[str, Method] | Any,
    sets: tuple[str, ...] = (),
    mixes: Known = (),
) -> Recipe:
    """Read a recipe from a file, a dict (or list of dicts: its documents) or a Recipe.

    `sets`: PATH=VALUE overrides of the document that gives the result. `methods` and `mixes`: the
    merge methods and GGUF types that there are.

    Raises RecipeError with every mistake that was found.
    """
    if isinstance(source, Recipe):
        source = source.documents
    name = "the recipe"
    if isinstance(source, Mapping):
        documents: list[yaml_reader.Parsed] = [(plain(source), {}, [])]
    elif isinstance(source, str | FilePath):
        name = str(source)
        documents = yaml_reader.parse(file_text(FilePath(source)), name)
    else:
        documents = [(plain(one), {}, []) for one in source]
    last = _result_among([value for value, _, _ in documents])
    for override in sets:
        value, places, problems = documents[last]
        documents[last] = overridden(value, override), places, problems
    recipes, mistakes = _read_all(documents, methods, mixes)
    if mistakes:
        raise RecipeError(f"{name} has mistakes:", problems=sorted(set(mistakes)))
    result = recipes.pop(last)
    return replace(result, stages=tuple(recipes)) if recipes else result


def _read_all(
    documents: Sequence[yaml_reader.Parsed], methods: Mapping[str, Method], mixes: Known
) -> tuple[list[Recipe], list[Problem]]:
    """Every document as a recipe, and the mistakes in all of them."""
    recipes: list[Recipe] = []
    mistakes: list[Problem] = []
    names: set[Any] = set()
    last = _result_among([value for value, _, _ in documents])
    for at, (value, places, problems) in enumerate(documents):
        checker = Checker(places, problems)
        read_value = RECIPE.read(value, (), checker.report)
        recipe = checker.recipe(read_value, value, methods)
        checker.check_gguf(read_value, mixes)
        if at != last:
            checker.check_stage(read_value, names)
        mistakes += checker.problems
        if recipe is not None:
            recipes.append(recipe)
        names.add(read_value.get("name"))
    return recipes, mistakes


def _result_among(documents: Sequence[Any]) -> int:
    """Which document gives the result: the one without a name, else the last."""
    unnamed = [at for at, value in enumerate(documents) if isinstance(value, Mapping) and value.get("name") is None]
    return unnamed[-1] if unnamed else len(documents) - 1
