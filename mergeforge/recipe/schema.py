"""The shapes of a recipe's values, written once: they check a recipe and print its JSON Schema.

Each shape has two members: `read(value, path, report)` gives the checked value and reports every
mistake with its path, and `json()` gives the JSON Schema for editors.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mergeforge.core.sizes import parse_size
from mergeforge.errors import did_you_mean
from mergeforge.recipe.yaml_reader import Path

Report = Callable[[Path, str, str], None]  # path, message, hint


class Shape(Protocol):
    def read(self, value: Any, path: Path, report: Report) -> Any: ...

    def json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Text:
    """Text that is not empty."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, str) or not value:
            report(path, f"{_last(path)} must be text, not {_kind(value)}", "quote it" if value is not None else "")
            return None
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1} | _about(self.about)


@dataclass(frozen=True)
class Flag:
    """true or false."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, bool):
            report(path, f"{_last(path)} must be true or false, not {_kind(value)}", "")
            return None
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "boolean"} | _about(self.about)


@dataclass(frozen=True)
class Whole:
    """A whole number of at least `low`."""

    low: int = 0
    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value < self.low:
            report(path, f"{_last(path)} must be a whole number of at least {self.low}, not {_kind(value)}", "")
            return None
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low} | _about(self.about)


@dataclass(frozen=True)
class Number:
    """A number in [low, high]; None: no bound."""

    low: float | None = None
    high: float | None = None
    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good = number and abs(value) <= sys.float_info.max  # neither NaN nor a whole number beyond all floats
        if not good or not self._inside(value):
            report(path, f"{_last(path)} must be a number{self._bounds()}, not {_kind(value)}", "")
            return None
        return value

    def json(self) -> dict[str, Any]:
        low = {} if self.low is None else {"minimum": self.low}
        high = {} if self.high is None else {"maximum": self.high}
        return {"type": "number"} | low | high | _about(self.about)

    def _inside(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def _bounds(self) -> str:
        low = "" if self.low is None else f" of at least {self.low:g}"
        return low if self.high is None else f"{low}{' and' if low else ''} at most {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]
    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if value not in self.words:
            hint = did_you_mean(str(value), self.words) or "one of: " + ", ".join(self.words)
            report(path, f"{_last(path)} cannot be {_kind(value)}", hint)
            return None
        return value

    def json(self) -> dict[str, Any]:
        return {"enum": list(self.words)} | _about(self.about)


@dataclass(frozen=True)
class Pattern:
    """A regular expression."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, str) or not value:
            report(path, f"{_last(path)} must be a regular expression, not {_kind(value)}", "")
            return None
        try:
            re.compile(value)
        except re.error as error:
            report(path, f"{value!r} is not a regular expression: {error}", "a dot is written \\.")
            return None
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "string", "format": "regex"} | _about(self.about)


@dataclass(frozen=True)
class Range:
    """[first, stop): two whole numbers, the second larger."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        whole = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        if not whole or len(value) != 2:
            text = f"{value}" if isinstance(value, list) else _kind(value)
            report(path, f"{_last(path)} must be two whole numbers, not {text}", "[first layer, layer to stop before]")
            return None
        if not 0 <= value[0] < value[1]:
            report(path, f"{_last(path)} {value} holds no layers", "[first layer, layer to stop before]")
            return None
        return tuple(value)

    def json(self) -> dict[str, Any]:
        whole = {"type": "integer", "minimum": 0}
        return {"type": "array", "items": whole, "minItems": 2, "maxItems": 2} | _about(self.about)


@dataclass(frozen=True)
class Size:
    """Bytes: a number, or text such as 5GB, 800MB or 2GiB."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        try:
            return parse_size(value)
        except ValueError as error:
            report(path, f"{_last(path)}: {error}", "")
            return None

    def json(self) -> dict[str, Any]:
        return {"type": ["string", "integer"]} | _about(self.about)


@dataclass(frozen=True)
class Setting:
    """A parameter: a number or flag, a gradient over the layers, or filters by tensor name."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if isinstance(value, list):
            return self._list(value, path, report)
        if isinstance(value, Mapping):
            return [self._filter(value, path, report)]
        return self._number(value, path, report)

    def _list(self, items: list[Any], path: Path, report: Report) -> Any:
        if not items:
            report(path, f"{_last(path)} is an empty list", "give at least one number")
            return None
        filters = [isinstance(item, Mapping) for item in items]
        if any(filters) and not all(filters):
            report(path, f"{_last(path)} mixes numbers and filters", "every item is {filter, value}, or none is")
            return None
        read = self._filter if all(filters) else self._number
        return [read(item, (*path, index), report) for index, item in enumerate(items)]

    def _filter(self, value: Mapping[str, Any], path: Path, report: Report) -> dict[str, Any]:
        for key in value:
            if key not in ("filter", "value"):
                report((*path, key), f"unknown key '{key}'", did_you_mean(str(key), ("filter", "value")))
        if "value" not in value:
            report(path, "a filter needs a value", "")
            return {}
        name = value.get("filter")
        if name is not None and not isinstance(name, str):
            report((*path, "filter"), f"a filter must be text, not {_kind(name)}", "part of a tensor's name")
        inner = value["value"]
        inner_path = (*path, "value")
        if isinstance(inner, list):
            if not inner:
                report(inner_path, f"{_name(path)} is an empty list", "give at least one number")
            number: Any = [self._number(item, (*inner_path, index), report) for index, item in enumerate(inner)]
        else:
            number = self._number(inner, inner_path, report)
        return {"value": number} if name is None else {"filter": name, "value": number}

    def _number(self, value: Any, path: Path, report: Report) -> Any:
        if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 1000):
            return value
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                return float(value)
            except ValueError:
                pass
        report(path, f"{_name(path)} must be a number, true or false, not {_kind(value)}", "")
        return None

    def json(self) -> dict[str, Any]:
        plain = {"type": ["number", "boolean"]}
        gradient = {"anyOf": [plain, {"type": "array", "items": plain, "minItems": 1}]}
        one = {
            "type": "object",
            "properties": {"filter": {"type": ["string", "null"]}, "value": gradient},
            "required": ["value"],
            "additionalProperties": False,
        }
        return {"anyOf": [gradient, one, {"type": "array", "items": one, "minItems": 1}]} | _about(self.about)


@dataclass(frozen=True)
class ListOf:
    """A list; with `lone`, a single item stands for a list of one."""

    item: Shape
    about: str = ""
    lone: bool = False

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if self.lone and isinstance(value, str | Mapping) and value:
            return [self.item.read(value, path, report)]
        if not isinstance(value, list) or not value:
            kind = "an empty one" if value == [] else _kind(value)
            report(path, f"{_last(path)} must be a list, not {kind}", "start each item with '- '")
            return []
        return [self.item.read(item, (*path, index), report) for index, item in enumerate(value)]

    def json(self) -> dict[str, Any]:
        many = {"type": "array", "items": self.item.json(), "minItems": 1}
        return ({"anyOf": [many, self.item.json()]} if self.lone else many) | _about(self.about)


@dataclass(frozen=True)
class MapOf:
    """A mapping from free names to values of one shape."""

    item: Shape
    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if not isinstance(value, Mapping):
            report(path, f"{_last(path)} must be a mapping, not {_kind(value)}", "write 'name: value' lines under it")
            return {}
        return {key: self.item.read(item, (*path, key), report) for key, item in value.items()}

    def json(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.item.json()} | _about(self.about)


@dataclass(frozen=True)
class Record:
    """A mapping with known keys; with `short`, another shape stands for {short: value}."""

    fields: Mapping[str, Shape]
    required: tuple[str, ...] = ()
    short: str = ""
    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if self.short and not isinstance(value, Mapping):
            value = {self.short: value}
            return {self.short: self.fields[self.short].read(value[self.short], path, report)}
        if not isinstance(value, Mapping):
            report(path, f"{_last(path)} must be a mapping, not {_kind(value)}", "write 'key: value' lines")
            return {}
        for key in value:
            if key not in self.fields:
                hint = did_you_mean(str(key), self.fields) or "known keys: " + ", ".join(self.fields)
                report((*path, key), f"unknown key '{key}'", hint)
        for key in self.required:
            if value.get(key) is None:
                report(path, f"{_last(path)} needs the key '{key}'", "")
        known = {key: item for key, item in value.items() if key in self.fields and item is not None}
        return {key: self.fields[key].read(item, (*path, key), report) for key, item in known.items()}

    def json(self) -> dict[str, Any]:
        record = {
            "type": "object",
            "properties": {key: shape.json() for key, shape in self.fields.items()},
            "additionalProperties": False,
        }
        if self.required:
            record["required"] = list(self.required)
        whole = {"anyOf": [self.fields[self.short].json(), record]} if self.short else record
        return whole | _about(self.about)


def _last(path: Path) -> str:
    names = [part for part in path if isinstance(part, str)]
    return f"'{names[-1]}'" if names else "the recipe"


def _name(path: Path) -> str:
    """Like _last, but a filter's value is named after its parameter."""
    return _last(tuple(part for part in path if part not in ("value", "filter")))


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _about(text: str) -> dict[str, Any]:
    return {"description": text} if text else {}
