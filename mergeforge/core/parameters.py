"""Parameters of an extension, read off its signature: kind, scope, default and allowed interval.

A merge method is a function whose keyword-only arguments are its recipe parameters. `weight:
list[float]` is one number for each input, `t: float` one for the whole tensor; an argument without
a default must stand in the recipe. A trailing underscore keeps Python keywords apart (`lambda_`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """Allowed values, e.g. (0, 1]; `open_low` leaves the lower end out."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Parameter:
    """One recipe parameter: `kind` is "float" or "bool", `per_input` one value for each input."""

    name: str
    kind: str
    per_input: bool
    required: bool
    default: Any
    within: Interval | None


def parameters_of(function: Callable[..., Any], within: Mapping[str, Interval]) -> dict[str, Parameter]:
    """The parameters that a function's keyword-only arguments declare, in their order."""
    found = {}
    for argument in inspect.signature(function).parameters.values():
        if argument.kind is not argument.KEYWORD_ONLY:
            continue
        name, annotation = argument.name.rstrip("_"), str(argument.annotation)
        found[name] = Parameter(
            name=name,
            kind="bool" if "bool" in annotation else "float",
            per_input=annotation.startswith("list["),
            required=argument.default is argument.empty,
            default=None if argument.default is argument.empty else argument.default,
            within=within.get(name),
        )
    return found
