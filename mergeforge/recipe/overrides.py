"""Recipe documents before validation: the text of a file, `--set` overrides, and values from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path as FilePath
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.recipe import yaml_reader
from mergeforge.recipe.keys import ENTRY_PARAMETERS
from mergeforge.recipe.schema import ListOf, MapOf, Object, Schema


def plain_value(value: Any) -> Any:
    """Convert a value from Python to what YAML would give: NumPy numbers, tuples and paths become plain ones."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def read_recipe_file(path: FilePath) -> str:
    """The text of a recipe file. Raises RecipeError."""
    try:
        with open(path, "rb") as file:
            data = file.read(yaml_reader.MAX_FILE_NBYTES + 1)
        if len(data) > yaml_reader.MAX_FILE_NBYTES:
            raise RecipeError(
                f"{path} is larger than 1 MiB", hint="a recipe has a few dozen lines; is this the right file?"
            )
        return data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe {path}", hint="`mergeforge init` writes a recipe to start from"
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, not a recipe") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def apply_override(value: Any, override: str, schema: Schema) -> Any:
    """Return `value` with PATH=VALUE set; list items by index (`adapters.0.weight=0.5`).

    schema: of `value`. A short form on the way (`- ./adapter`) becomes the mapping that it stands for.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r}: write PATH=VALUE, for example adapters.0.weight=0.5")
    return _with(value, path.split("."), yaml_reader.scalar(text), override, schema)


def _with(value: Any, path: list[str], new: Any, override: str, schema: Schema | None) -> Any:
    if not path:
        return new
    key, *rest = path
    value, inner = _expanded(value, schema), _schema_of(key, schema)
    if isinstance(value, list):
        if not key.isdecimal() or int(key) >= len(value):
            raise RecipeError(f"override {override!r}: '{key}' is not an item of a list of {len(value)}")
        return [_with(item, rest, new, override, inner) if at == int(key) else item for at, item in enumerate(value)]
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(f"override {override!r}: '{key}' is inside {value!r}, which is not a mapping")
    mapping = dict(value or {})
    if not rest and key in ENTRY_PARAMETERS and key in (mapping.get("parameters") or {}):
        return _with(mapping, ["parameters", key], new, override, schema)
    return {**mapping, key: _with(mapping.get(key), rest, new, override, inner)}


def _expanded(value: Any, schema: Schema | None) -> Any:
    """A short form as what it stands for: `{adapter: ./adapter}` for `./adapter`, a list of one for its only item."""
    if value is None or isinstance(value, list | Mapping):
        return value
    if isinstance(schema, Object) and schema.shorthand:
        return {schema.shorthand: value}
    return [value] if isinstance(schema, ListOf) and schema.allow_scalar else value


def _schema_of(key: str, schema: Schema | None) -> Schema | None:
    """The schema of one key or item of a value; None where there is none."""
    if isinstance(schema, Object):
        return schema.fields.get(key)
    return schema.item if isinstance(schema, ListOf | MapOf) else None
