"""mergeforge: merge language models and LoRA adapters without loading them.

    import mergeforge

    plan = mergeforge.plan("recipe.yaml", memory="4GiB")
    print(plan)
    result = mergeforge.run(plan)
    mergeforge.merge(base_model="...", adapters=["a", "b"], weights=[0.6, 0.4], method="linear", out="merged")

Names are loaded on first use: importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULE_OF = {
    **dict.fromkeys(("plan", "run", "iter_run", "merge", "verify", "inspect", "diff"), "api"),
    **dict.fromkeys(("convert_to_gguf", "convert_from_gguf", "extract_lora", "combine_adapters", "publish"), "api"),
    "Plan": "planner",
    "Recipe": "recipe",
    "RunResult": "operations.merge",
    "QuickTrainer": "train.quick_trainer",
    **dict.fromkeys(("MergeforgeError", "RecipeError", "SourceError", "BudgetError", "OutputError"), "errors"),
    "MissingExtraError": "errors",
}
_SUBPACKAGES = ("train", "eval")
__all__ = sorted([*_MODULE_OF, *_SUBPACKAGES])


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"mergeforge.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mergeforge' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"mergeforge.{_MODULE_OF[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
