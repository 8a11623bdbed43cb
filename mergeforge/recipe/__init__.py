"""Recipe: what a merge is to do, read strictly from YAML or a dict.

mergekit's keys, plus `adapters` and `output`. Reading needs neither torch nor the models, and
reports every mistake of a file at once, each with its line and column.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path as FilePath
from typing import Any

from mergeforge.errors import Problem, RecipeError
from mergeforge.recipe import text
from mergeforge.recipe.checking import Checker, Known, Method
from mergeforge.recipe.entries import OUT_DTYPES, AdapterEntry, GGUFEntry, ModelEntry, ModelRef, Output, Recipe
from mergeforge.recipe.language import RECIPE, json_schema

__all__ = [
    "OUT_DTYPES",
    "AdapterEntry",
    "GGUFEntry",
    "ModelEntry",
    "ModelRef",
    "Output",
    "Recipe",
    "json_schema",
    "read",
]


def read(
    source: str | FilePath | Mapping[str, Any] | Recipe,
    methods: Mapping[str, Method] | Any,
    sets: tuple[str, ...] = (),
    mixes: Known = (),
) -> Recipe:
    """Read a recipe from a file, a dict or a Recipe; `sets` are PATH=VALUE overrides.

    `methods` and `mixes`: the merge methods and GGUF types that there are.

    Raises RecipeError with every mistake that was found.
    """
    if isinstance(source, Recipe):
        source = source.raw
    name = "the recipe"
    places: text.Places = {}
    problems: list[Problem] = []
    if isinstance(source, Mapping):
        value: Any = _plain(source)
    else:
        name = str(source)
        value, places, problems = text.parse(_file_text(FilePath(source)), name)
    for override in sets:
        value = _override(value, override, places)
    checker = Checker(places, problems)
    read_value = RECIPE.read(value, (), checker.report)
    recipe = checker.recipe(read_value, value, methods)
    checker.check_gguf(read_value, mixes)
    if checker.problems or recipe is None:
        raise RecipeError(f"{name} has mistakes:", problems=sorted(set(checker.problems)))
    return recipe


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
