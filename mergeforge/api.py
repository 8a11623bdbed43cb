"""The Python interface: plan() and merge(), as the package's docstring shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.execute import executor
from mergeforge.methods import METHODS
from mergeforge.planner import Plan, make_plan
from mergeforge.recipe import Recipe

Source = str | Path | Mapping[str, Any] | Recipe


def plan(
    recipe: Source,
    *,
    out: str | Path | None = None,
    sets: Sequence[str] = (),
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
) -> Plan:
    """Decide a merge from a recipe file, a dict or a Recipe; reads headers only.

    Raises MergeforgeError's children when something is wrong, before anything is written.
    """
    return make_plan(
        recipe,
        out=out,
        sets=sets,
        memory=memory,
        device=device,
        threads=threads,
        allow_pickle=allow_pickle,
        allow_nonfinite=allow_nonfinite,
    )


def merge(
    recipe: Source | None = None,
    *,
    base_model: str | None = None,
    models: Sequence[str] = (),
    adapters: Sequence[str] = (),
    weights: Sequence[float] = (),
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Merge in one call, from a recipe or from its parts; returns the output folder.

    `weights` belong to `models` and then `adapters`, in order (default: 1 each). `options` are
    those of plan().
    """
    if recipe is None:
        recipe = _recipe(base_model, models, adapters, weights, method, parameters)
    elif base_model or models or adapters or weights or method or parameters:
        raise RecipeError("give a recipe or its parts, not both")
    return executor.merge(plan(recipe, out=out, **options), fresh=fresh, overwrite=overwrite)


def _recipe(
    base_model: str | None,
    models: Sequence[str],
    adapters: Sequence[str],
    weights: Sequence[float],
    method: str | None,
    parameters: Mapping[str, Any] | None,
) -> dict[str, Any]:
    each: list[float | None] = [float(weight) for weight in weights]
    if each and len(each) != len(models) + len(adapters):
        raise RecipeError(f"{len(each)} weights for {len(models)} models and {len(adapters)} adapters")
    if not each:
        takes_weight = method is None or method not in METHODS or "weight" in METHODS[method].parameters
        each = [1.0 if takes_weight else None] * (len(models) + len(adapters))
    parts: dict[str, Any] = {
        "merge_method": method,
        "base_model": base_model,
        "models": [_weighted_model(model, weight) for model, weight in zip(models, each, strict=False)],
        "adapters": [
            {"adapter": adapter} | ({} if weight is None else {"weight": weight})
            for adapter, weight in zip(adapters, each[len(models) :], strict=True)
        ],
        "parameters": dict(parameters or {}),
    }
    return {key: value for key, value in parts.items() if value}


def _weighted_model(model: str, weight: float | None) -> dict[str, Any]:
    return {"model": model} | ({} if weight is None else {"parameters": {"weight": weight}})
