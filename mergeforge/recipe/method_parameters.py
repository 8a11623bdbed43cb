"""Checks of the parameters that a recipe gives to its merge methods.

A misspelled parameter is a mistake. One that has no effect where it stands (another method's, or one value for the
whole merge given for one model) is a warning: mergekit accepts such configs silently, and there are many of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mergeforge.core.parameters import Parameter
from mergeforge.errors import did_you_mean
from mergeforge.recipe.builder import check_values
from mergeforge.recipe.model import ModelEntry, Recipe
from mergeforge.recipe.schema import ReportProblem
from mergeforge.recipe.yaml_reader import Path

# Parameters of mergekit that have no effect; accepted for any method.
_WITHOUT_EFFECT = ("int8_mask",)
# Parameters in configs for mergekit that no version of it has read since its methods have signatures.
_FORMER = ("embed_slerp", "consensus_method", "naive_count")


class MethodSignature(Protocol):
    """The facts about a merge method that validation needs."""

    @property
    def parameters(self) -> Mapping[str, Parameter]: ...

    @property
    def needs_base(self) -> bool: ...

    @property
    def base_is_input(self) -> bool: ...

    @property
    def on_deltas(self) -> bool: ...

    @property
    def optional_base(self) -> bool: ...


@dataclass(frozen=True)
class _Scope:
    """Where parameters stand: the methods that they reach, by name, what these take, and for which inputs.

    inputs: "all", "one", or "base" where the one is the base of task vectors, for which no method takes a parameter.
    """

    method: str
    known: Mapping[str, Parameter]
    inputs: str


def check_parameters(
    recipe: Recipe,
    known: Mapping[str, Parameter],
    methods: Mapping[str, MethodSignature],
    report: ReportProblem,
    warn: ReportProblem,
) -> None:
    """Report mistakes in a recipe's parameters, and warn of those without effect.

    `known`: the parameters of every method that the recipe uses.
    """
    elsewhere = {*_FORMER, *(name for method in methods for name in methods[method].parameters)}

    def check(parameters: Mapping[str, Any], path: Path, scope: _Scope) -> None:
        for name, value in parameters.items():
            _check(name, value, (*path, name), scope, elsewhere, report, warn)

    shared, own = _Scope(recipe.method_name, known, "all"), _Scope(recipe.method_name, known, "one")
    base = own
    if recipe.merge_method and not any(rule.merge_method for rule in recipe.rules):
        method = methods[recipe.merge_method]
        base = replace(own, inputs="base") if method.on_deltas or method.optional_base else own
    for path, parameters in _shared_parameters(recipe):
        check(parameters, (*path, "parameters"), shared)
    for path, entries in model_lists(recipe):
        for index, model in enumerate(entries):
            is_base = recipe.base_model is not None and str(model) == str(recipe.base_model)
            check(model.parameters, (*path, index, "parameters"), base if is_base else own)
    for index, rule in enumerate(recipe.rules):
        name = rule.merge_method
        scope = _Scope(name, methods[name].parameters, "all") if name else shared
        check(rule.parameters, ("rules", index, "parameters"), scope)
    for index, adapter in enumerate(recipe.adapters):
        weight = {} if adapter.weight == 1 and adapter.weight is not True else {"weight": adapter.weight}
        check({**weight, **adapter.parameters}, ("adapters", index, "parameters"), own)


def parameter_notes(recipe: Recipe) -> list[str]:
    """Notes on parameters that have no effect in any method."""
    scopes = [parameters for _, parameters in _shared_parameters(recipe)]
    scopes += [rule.parameters for rule in recipe.rules]
    text = "has no effect: masks are never stored (it has none in mergekit either)"
    return [f"{name} {text}" for name in _WITHOUT_EFFECT if any(name in scope for scope in scopes)]


def _check(
    name: str, value: Any, path: Path, scope: _Scope, elsewhere: set[str], report: ReportProblem, warn: ReportProblem
) -> None:
    parameter, takes = scope.known.get(name), ", ".join(scope.known)
    if parameter is None and name in _WITHOUT_EFFECT:
        return
    if parameter is None and name in elsewhere:
        warn(path, f"'{name}' has no effect", f"{scope.method} takes {f'only {takes}' if takes else 'no parameters'}")
    elif parameter is None:
        hint = did_you_mean(name, scope.known) or did_you_mean(name, elsewhere)
        report(path, f"{scope.method} has no parameter '{name}'", hint or f"{scope.method} takes: {takes or 'none'}")
    elif scope.inputs != "all" and not parameter.per_input:
        text = f"in {scope.method} it is one value for the whole merge, in the top-level 'parameters'"
        warn(path, f"'{name}' of a single input has no effect", text)
    elif scope.inputs == "base":
        warn(path, f"'{name}' of the base model has no effect", f"{scope.method} takes it for the other models")
    else:
        check_values(value, path, parameter, report)


def model_lists(recipe: Recipe) -> Iterator[tuple[Path, tuple[ModelEntry, ...]]]:
    """Yield every list of models that are merged with one another, and its path."""
    parts: list[tuple[Path, Any]] = [((), recipe)]
    parts += [(("modules", module.name), module) for module in recipe.modules]
    for path, part in parts:
        yield (*path, "models"), part.models
        for index, slice_ in enumerate(part.slices):
            yield (*path, "slices", index, "sources"), slice_.sources
    for index, rule in enumerate(recipe.rules):
        yield ("rules", index, "models"), rule.models


def _shared_parameters(recipe: Recipe) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the parameters that apply to more than one model, and their paths: the recipe's, a module's, a slice's."""
    parts: list[tuple[Path, Any]] = [((), recipe)]
    parts += [(("modules", module.name), module) for module in recipe.modules]
    for path, part in parts:
        yield path, part.parameters
        for index, slice_ in enumerate(part.slices):
            yield (*path, "slices", index), slice_.parameters
