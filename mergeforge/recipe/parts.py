"""A recipe from its parts: the arguments of `mergeforge.merge` and the options of `mergeforge merge`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.recipe.method_parameters import MethodSignature


def recipe_of(
    base_model: str | Path | None,
    models: Sequence[str | Path],
    adapters: Sequence[str | Path],
    weights: Sequence[Any],
    methods: Mapping[str, MethodSignature],
    method: str | None,
    parameters: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    output_keys: Collection[str],
) -> dict[str, Any]:
    """The recipe as a dict.

    weights: of the models, then of the adapters; none, or None for one of them, is 1 where the method takes weights.
    methods: the known merge methods. settings: further keys of a recipe or, if they are in output_keys, of its output.
    """
    if weights and len(weights) != len(models) + len(adapters):
        raise RecipeError(f"{len(weights)} weights for {len(models)} models and {len(adapters)} adapters")
    takes_weight = method is None or method not in methods or "weight" in methods[method].parameters
    given = weights or [None] * (len(models) + len(adapters))
    by_input = [1.0 if weight is None and takes_weight else weight for weight in given]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": base_model if base_model is None else str(base_model),
        "models": [
            {"model": str(model)} | ({} if weight is None else {"parameters": {"weight": weight}})
            for model, weight in zip(models, by_input, strict=False)
        ],
        "adapters": [
            {"adapter": str(adapter)} | ({} if weight is None else {"weight": weight})
            for adapter, weight in zip(adapters, by_input[len(models) :], strict=True)
        ],
        "parameters": dict(parameters or {}),
    }
    recipe |= {name: value for name, value in settings.items() if name not in output_keys or name == "name"}
    if output := {name: value for name, value in settings.items() if name in output_keys and name != "name"}:
        recipe["output"] = {**recipe.get("output", {}), **output}
    return {key: value for key, value in recipe.items() if value not in (None, [], {})}
