"""mergeforge: merges language models and adapters in the memory that it is given.

    import mergeforge
    plan = mergeforge.plan("recipe.yaml", memory="4GiB", device="cuda")
    for tile in mergeforge.run(plan): ...
    mergeforge.merge(base_model="...", adapters=["a", "b"], weights=[0.6, 0.4], method="linear", out="merged")

Names are loaded on first use: importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "plan": ("mergeforge.api", "plan"),
    "run": ("mergeforge.execute.executor", "run"),
    "merge": ("mergeforge.api", "merge"),
    "verify": ("mergeforge.operations.verify", "verify"),
    "QuickTrainer": ("mergeforge.train.quick_trainer", "QuickTrainer"),
    "Plan": ("mergeforge.planner", "Plan"),
    "Recipe": ("mergeforge.recipe", "Recipe"),
    "MergeforgeError": ("mergeforge.errors", "MergeforgeError"),
    "RecipeError": ("mergeforge.errors", "RecipeError"),
    "SourceError": ("mergeforge.errors", "SourceError"),
    "BudgetError": ("mergeforge.errors", "BudgetError"),
    "OutputError": ("mergeforge.errors", "OutputError"),
    "MissingExtraError": ("mergeforge.errors", "MissingExtraError"),
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mergeforge' has no attribute {name!r}")
    module, attribute = _NAMES[name]
    globals()[name] = getattr(import_module(module), attribute)
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *_NAMES]
