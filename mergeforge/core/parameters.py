"""Parameter: a recipe parameter of an extension, read from its signature.

A merge method is a function whose keyword-only arguments are its recipe parameters. `weight: list[float]` is one number
per input, `t: float` one per tensor; an argument without a default is required in the recipe. A trailing underscore
avoids Python keywords (`lambda_`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """Allowed values, e.g. (0, 1]; `open_low` excludes the lower end."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Parameter:
    """One recipe parameter: `kind` is "float" or "bool", `per_input` means one value per input."""

    name: str
    kind: str
    per_input: bool
    required: bool
    default: Any
    within: Interval | None


def parameters_of(function: Callable[..., Any], within: Mapping[str, Interval]) -> dict[str, Parameter]:
    """The parameters that the keyword-only arguments of a function declare, in order."""
    parameters = {}
    for argument in inspect.signature(function).parameters.values():
        if argument.kind is not argument.KEYWORD_ONLY:
            continue
        name, annotation = argument.name.rstrip("_"), str(argument.annotation)
        parameters[name] = Parameter(
            name=name,
            kind="bool" if "bool" in annotation else "float",
            per_input=annotation.startswith("list["),
            required=argument.default is argument.empty,
            default=None if argument.default is argument.empty else argument.default,
            within=within.get(name),
        )
    return parameters
