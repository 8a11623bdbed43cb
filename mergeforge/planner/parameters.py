"""The values of a method's parameters for one tensor: the innermost scope that sets a parameter wins.

A rule's parameters come first, then an input's own, its slice's, its module's, the recipe's, and last the method's
default. The order from the input outwards is mergekit's (mergekit/config.py, ConfigReader.parameter_sources). As in
mergekit, a filter of a per-input parameter is matched with the tensor's name in that input, any other filter with its
name in the output (mergekit/parameter_resolver.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.core.parameters import Parameter
from mergeforge.errors import RecipeError
from mergeforge.methods import Method
from mergeforge.recipe.parameter_values import value_at

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class MethodInput:
    """One input of a method: its label, its own parameters, and the tensor's name in it."""

    label: str
    parameters: Parameters
    name: str


def parameters_for(
    method: Method,
    name: str,
    position: float,
    inputs: Sequence[MethodInput],
    scopes: Sequence[Parameters],
    *,
    own_first: bool = True,
) -> dict[str, Any]:
    """The method's parameters for one tensor; per-input parameters are lists, in the inputs' order.

    `scopes`: a rule's parameters, then the others, innermost first. `own_first`: an input's own parameters win over the
    rule's.

    Raises RecipeError for a required parameter that is missing, or for values that make no sense together.
    """
    values: dict[str, Any] = {}
    rule, *others = scopes
    for parameter in method.parameters.values():
        if not parameter.per_input:
            values[parameter.name] = _value(method, parameter, name, position, scopes, "")
            continue
        values[parameter.name] = [
            _value(
                method,
                parameter,
                source.name,
                position,
                (source.parameters, rule, *others) if own_first else (rule, source.parameters, *others),
                f" for {source.label}",
            )
            for source in inputs
        ]
    try:
        method.check_parameters(values)
    except ValueError as error:
        raise RecipeError(f"{method.name} at {name}: {error}") from None
    return values


def _value(
    method: Method, parameter: Parameter, name: str, position: float, scopes: Sequence[Parameters], owner: str
) -> Any:
    values = (value_at(scope.get(parameter.name), name, position, kind=parameter.kind) for scope in scopes)
    value = next((value for value in values if value is not None), None)
    if value is None and parameter.required:
        hint = f"add 'parameters: {{{parameter.name}: ...}}'; with filters, add one without a filter for the rest"
        raise RecipeError(f"{method.name} needs '{parameter.name}'{owner} at {name}", hint=hint)
    value = parameter.default if value is None else value
    if value is None:
        return None
    return bool(value) if parameter.kind == "bool" else float(value)
