"""Recipe: what a merge is to do, read strictly from YAML or a dict.

mergekit's keys, plus `adapters`, `rules` and `output`. Several documents in one file are merges that
use each other's results by name. Reading needs neither torch nor the models, and
reports every mistake of a file at once, each with its line and column.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path as FilePath
from typing import Any

from mergeforge.errors import Problem, RecipeError
from mergeforge.recipe import text
from mergeforge.recipe.checking import WITHOUT_EFFECT, Checker, Known, Method
from mergeforge.recipe.entries import (
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
from mergeforge.recipe.language import RECIPE, json_schema

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
        documents: list[text.Parsed] = [(_plain(source), {}, [])]
    elif isinstance(source, str | FilePath):
        name = str(source)
        documents = text.parse(_file_text(FilePath(source)), name)
    else:
        documents = [(_plain(one), {}, []) for one in source]
    last = _result_among([value for value, _, _ in documents])
    for override in sets:
        value, places, problems = documents[last]
        documents[last] = _override(value, override, places), places, problems
    recipes, mistakes = _read_all(documents, methods, mixes)
    if mistakes:
        raise RecipeError(f"{name} has mistakes:", problems=sorted(set(mistakes)))
    result = recipes.pop(last)
    return replace(result, stages=tuple(recipes)) if recipes else result


def _read_all(
    documents: Sequence[text.Parsed], methods: Mapping[str, Method], mixes: Known
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


def _plain(value: Any) -> Any:
    """A dict from Python as YAML would give it: numbers of NumPy, tuples and paths become plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _file_text(path: FilePath) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(text.LARGEST_FILE + 1)
        if len(data) > text.LARGEST_FILE:
            raise RecipeError(f"{path} is larger than 1 MiB", hint="a recipe is a few dozen lines")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}", hint="`mergeforge init` writes one to start from") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, not a recipe") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _override(value: Any, override: str, places: text.Places) -> Any:
    """`value` with PATH=VALUE set; list items by index (`adapters.0.weight=0.5`)."""
    path, equals, written = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write PATH=VALUE, such as --set adapters.0.weight=0.5")
    return _with(value, path.split("."), text.scalar(written), override)


def _with(value: Any, path: list[str], new: Any, override: str) -> Any:
    if not path:
        return new
    key, *rest = path
    if isinstance(value, list):
        if not key.isdecimal() or int(key) >= len(value):
            raise RecipeError(f"--set {override}: '{key}' is not an item of a list of {len(value)}")
        return [_with(item, rest, new, override) if at == int(key) else item for at, item in enumerate(value)]
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(f"--set {override}: '{key}' is inside {value!r}, which is not a mapping")
    return {**(value or {}), key: _with((value or {}).get(key), rest, new, override)}
