"""Schemas of recipe values: each one validates a value and prints its JSON Schema.

A schema has two methods: `read(value, path, report)` returns the checked value and reports every
mistake with its path; `json_schema()` returns the JSON Schema for editors.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mergeforge.core.sizes import parse_size
from mergeforge.errors import did_you_mean
from mergeforge.recipe.yaml_reader import Path


class ReportProblem(Protocol):
    """Takes one mistake: the path of the value, what is wrong, and what to do about it."""

    def __call__(self, path: Path, message: str, hint: str = "", /) -> None: ...


class Schema(Protocol):
    """One kind of value: validates it and describes it as JSON Schema."""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any: ...

    def json_schema(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class String:
    """A string that is not empty."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if not isinstance(value, str) or not value:
            is_unquoted = isinstance(value, int | float)
            report(path, f"{_last(path)} must be a string, not {_kind(value)}", "quote it" if is_unquoted else "")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1} | _description(self.description)


@dataclass(frozen=True)
class Boolean:
    """true or false."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if not isinstance(value, bool):
            report(path, f"{_last(path)} must be true or false, not {_kind(value)}", "")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": "boolean"} | _description(self.description)


@dataclass(frozen=True)
class Integer:
    """A whole number of at least `low`."""

    low: int = 0
    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value < self.low:
            report(path, f"{_last(path)} must be a whole number of at least {self.low}, not {_kind(value)}", "")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low} | _description(self.description)


@dataclass(frozen=True)
class Number:
    """A number in [low, high]; None: no limit."""

    low: float | None = None
    high: float | None = None
    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
            with contextlib.suppress(ValueError):
                value = float(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_finite = is_number and abs(value) <= sys.float_info.max  # neither NaN nor an integer too large for a float
        if not is_finite or not self._inside(value):
            report(path, f"{_last(path)} must be a number{self._bounds()}, not {_kind(value)}", "")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        low = {} if self.low is None else {"minimum": self.low}
        high = {} if self.high is None else {"maximum": self.high}
        return {"type": "number"} | low | high | _description(self.description)

    def _inside(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def _bounds(self) -> str:
        low = "" if self.low is None else f" of at least {self.low:g}"
        return low if self.high is None else f"{low}{' and' if low else ''} at most {self.high:g}"


@dataclass(frozen=True)
class Enum:
    """One of a few values. `equivalents`: how other programs spell them."""

    values: tuple[str, ...]
    description: str = ""
    equivalents: Mapping[str, str] = field(default_factory=dict)

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if value not in self.values:
            hint = did_you_mean(str(value), self.values, self.equivalents) or "one of: " + ", ".join(self.values)
            report(path, f"{_last(path)} cannot be {_kind(value)}", hint)
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"enum": list(self.values)} | _description(self.description)


@dataclass(frozen=True)
class Pattern:
    """A regular expression."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if not isinstance(value, str) or not value:
            report(path, f"{_last(path)} must be a regular expression, not {_kind(value)}", "")
            return None
        try:
            re.compile(value)
        except re.error as error:
            report(path, f"{value!r} is not a valid regular expression: {error}", "write \\. for a literal dot")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "format": "regex"} | _description(self.description)


@dataclass(frozen=True)
class Range:
    """[first, stop): two whole numbers, the second larger."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        is_whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        if not is_whole or len(value) != 2:
            text = f"{value}" if isinstance(value, list) else _kind(value)
            report(path, f"{_last(path)} must be two whole numbers, not {text}", "write [first layer, last layer + 1]")
            return None
        if not 0 <= value[0] < value[1]:
            report(path, f"{_last(path)} {value} selects no layers", "write [first layer, last layer + 1]")
            return None
        return tuple(value)

    def json_schema(self) -> dict[str, Any]:
        index = {"type": "integer", "minimum": 0}
        return {"type": "array", "items": index, "minItems": 2, "maxItems": 2} | _description(self.description)


@dataclass(frozen=True)
class Size:
    """Bytes: a number, or a string such as 5GB, 800MB or 2GiB."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        try:
            return parse_size(value)
        except ValueError as error:
            report(path, f"{_last(path)}: {error}", "")
            return None

    def json_schema(self) -> dict[str, Any]:
        return {"type": ["string", "integer"]} | _description(self.description)


@dataclass(frozen=True)
class ParameterValue:
    """A method parameter: a number or boolean, a gradient over the layers, or filters by tensor name."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, list):
            return self._list(value, path, report)
        if isinstance(value, Mapping):
            return [self._filter(value, path, report)]
        return self._number(value, path, report)

    def _list(self, items: list[Any], path: Path, report: ReportProblem) -> Any:
        if not items:
            report(path, f"{_last(path)} is an empty list", "give at least one number")
            return None
        filters = [isinstance(item, Mapping) for item in items]
        if any(filters) and not all(filters):
            report(path, f"{_last(path)} mixes numbers and filters", "write {filter, value} for every item or for none")
            return None
        read = self._filter if all(filters) else self._number
        return [read(item, (*path, index), report) for index, item in enumerate(items)]

    def _filter(self, value: Mapping[str, Any], path: Path, report: ReportProblem) -> dict[str, Any]:
        for key in value:
            if key not in ("filter", "value"):
                report((*path, key), f"unknown key '{key}'", did_you_mean(str(key), ("filter", "value")))
        if "value" not in value:
            report(path, "a filter needs a value", "")
            return {}
        name = value.get("filter")
        if name is not None and not isinstance(name, str):
            report(
                (*path, "filter"), f"a filter must be a string, not {_kind(name)}", "write a part of a tensor's name"
            )
        inner = value["value"]
        inner_path = (*path, "value")
        if isinstance(inner, list):
            if not inner:
                report(inner_path, f"{_name(path)} is an empty list", "give at least one number")
            number: Any = [self._number(item, (*inner_path, index), report) for index, item in enumerate(inner)]
        else:
            number = self._number(inner, inner_path, report)
        return {"value": number} if name is None else {"filter": name, "value": number}

    def _number(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 1000):
            return value
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
            try:
                return float(value)
            except ValueError:
                pass
        report(path, f"{_name(path)} must be a number, true or false, not {_kind(value)}", "")
        return None

    def json_schema(self) -> dict[str, Any]:
        plain = {"type": ["number", "boolean"]}
        gradient = {"anyOf": [plain, {"type": "array", "items": plain, "minItems": 1}]}
        filtered = {
            "type": "object",
            "properties": {"filter": {"type": ["string", "null"]}, "value": gradient},
            "required": ["value"],
            "additionalProperties": False,
        }
        return {"anyOf": [gradient, filtered, {"type": "array", "items": filtered, "minItems": 1}]} | _description(
            self.description
        )


@dataclass(frozen=True)
class ListOf:
    """A list; with `allow_scalar`, a single item means a list of one."""

    item: Schema
    description: str = ""
    allow_scalar: bool = False

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if self.allow_scalar and isinstance(value, str | Mapping) and value:
            return [self.item.read(value, path, report)]
        if not isinstance(value, list) or not value:
            text = "is an empty list" if value == [] else f"must be a list, not {_kind(value)}"
            report(path, f"{_last(path)} {text}", "start each item with '- '")
            return []
        return [self.item.read(item, (*path, index), report) for index, item in enumerate(value)]

    def json_schema(self) -> dict[str, Any]:
        many = {"type": "array", "items": self.item.json_schema(), "minItems": 1}
        return ({"anyOf": [many, self.item.json_schema()]} if self.allow_scalar else many) | _description(
            self.description
        )


@dataclass(frozen=True)
class MapOf:
    """A mapping from any names to values of one schema."""

    item: Schema
    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if not isinstance(value, Mapping):
            report(path, f"{_last(path)} must be a mapping, not {_kind(value)}", "write 'name: value' lines under it")
            return {}
        return {key: self.item.read(item, (*path, key), report) for key, item in value.items()}

    def json_schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.item.json_schema()} | _description(self.description)


@dataclass(frozen=True)
class Object:
    """A mapping with known keys; with a `shorthand`, any other value means {shorthand: value}.

    `equivalents`: unknown keys -> what to write instead (equivalents.py).
    """

    fields: Mapping[str, Schema]
    required: tuple[str, ...] = ()
    shorthand: str = ""
    description: str = ""
    equivalents: Mapping[str, str] = field(default_factory=dict)

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if self.shorthand and not isinstance(value, Mapping):
            value = {self.shorthand: value}
            return {self.shorthand: self.fields[self.shorthand].read(value[self.shorthand], path, report)}
        if not isinstance(value, Mapping):
            report(path, f"{_last(path)} must be a mapping, not {_kind(value)}", "write 'key: value' lines")
            return {}
        for key in value:
            if key not in self.fields:
                hint = did_you_mean(str(key), self.fields, self.equivalents) or "known keys: " + ", ".join(self.fields)
                report((*path, key), f"unknown key '{key}'", hint)
        for key in self.required:
            if value.get(key) is None:
                report(path, f"{_last(path)} needs the key '{key}'", "")
        known = {key: item for key, item in value.items() if key in self.fields and item is not None}
        return {key: self.fields[key].read(item, (*path, key), report) for key, item in known.items()}

    def json_schema(self) -> dict[str, Any]:
        mapping = {
            "type": "object",
            "properties": {key: schema.json_schema() for key, schema in self.fields.items()},
            "additionalProperties": False,
        }
        if self.required:
            mapping["required"] = list(self.required)
        shorthand = self.fields[self.shorthand].json_schema() if self.shorthand else None
        return ({"anyOf": [shorthand, mapping]} if shorthand else mapping) | _description(self.description)


def _last(path: Path) -> str:
    names = [part for part in path if isinstance(part, str)]
    return f"'{names[-1]}'" if names else "the recipe"


def _name(path: Path) -> str:
    """Like _last, but names the parameter of a filter's value."""
    return _last(tuple(part for part in path if part not in ("value", "filter")))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _description(text: str) -> dict[str, Any]:
    return {"description": text} if text else {}
