"""Documents before they are checked: the text of a file, `--set` overrides, values given from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path as FilePath
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.recipe import yaml_reader


def plain(value: Any) -> Any:
    """A dict from Python as YAML would give it: numbers of NumPy, tuples and paths become plain ones."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def file_text(path: FilePath) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(yaml_reader.LARGEST_FILE + 1)
        if len(data) > yaml_reader.LARGEST_FILE:
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


def overridden(value: Any, override: str) -> Any:
    """`value` with PATH=VALUE set; list items by index (`adapters.0.weight=0.5`)."""
    path, equals, written = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: write PATH=VALUE, such as --set adapters.0.weight=0.5")
    return _with(value, path.split("."), yaml_reader.scalar(written), override)


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
