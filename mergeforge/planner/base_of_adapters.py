"""The base model of a recipe that names none: the one that the adapter_config.json of its adapters names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergeforge.errors import RecipeError, SourceError, format_list
from mergeforge.planner.inputs import Opener
from mergeforge.recipe import ModelEntry, ModelRef, Recipe

_HINT = "name it: base_model in a recipe, --base MODEL for `mergeforge merge`"


def with_base_of_adapters(recipe: Recipe, opener: Opener) -> Recipe:
    """The recipe, with the base model that all its adapters name if it has none itself.

    Raises RecipeError if the adapters name different models or none, SourceError if there is no such model.
    """
    if recipe.base_model or not recipe.only_adapters:
        return recipe
    named = {str(entry.adapter): _base_of(opener.adapter_config(entry)) for entry in recipe.adapters}
    bases = {str(base): base for base in named.values() if base}
    if not bases:
        raise RecipeError(f"{format_list(named)}: no adapter_config.json names a base model", hint=_HINT)
    if len(bases) > 1:
        text = "; ".join(f"{adapter} on {base}" for adapter, base in named.items() if base)
        raise RecipeError(f"the adapters were trained on different base models: {text}", hint=_HINT)
    (reference,) = bases.values()
    owner = next(adapter for adapter, base in named.items() if base)
    try:
        opener.find_model(reference)
    except SourceError as error:
        raise SourceError(f"{owner} was trained on {reference}, but {error}", hint=_HINT) from None
    note = f"base_model: {reference}, from adapter_config.json of {owner}"
    raw = {"base_model": str(reference), **recipe.raw}
    return replace(recipe, base_model=ModelEntry(reference), raw=raw, notes=(*recipe.notes, note))


def _base_of(config: Mapping[str, Any]) -> ModelRef | None:
    """The base model that an adapter_config.json names, with its revision."""
    path, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(path, str) or not path.strip():
        return None
    return ModelRef(path.strip().rstrip("/") or "/", revision if isinstance(revision, str) and revision else None)
