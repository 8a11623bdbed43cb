"""Recipes as the commands read them first: without the planner, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeforge.recipe import Recipe


def read_recipe(source: str | Mapping[str, Any], sets: Sequence[str]) -> Recipe:
    """Read a recipe file or dict with overrides, and check it. Raises RecipeError."""
    from mergeforge.gguf.file_types import ALIASES, FILE_TYPES
    from mergeforge.methods import METHODS
    from mergeforge.recipe import read

    return read(source, METHODS, tuple(sets), (*FILE_TYPES, *ALIASES))
