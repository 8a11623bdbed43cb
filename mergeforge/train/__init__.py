"""Trains adapters for merges. Needs transformers, peft and accelerate.

settings.py -> plan.py -> run.py -> post_training.py: what the user asks for, the resolved plan, the run, and merging,
GGUF and publishing afterwards. Only `loop/` imports torch at module level.

    from mergeforge.train import make_plan, run_post_training, train
    plan = make_plan("train.yaml")
    trained = train(plan)
    run_post_training(plan, plan.settings.after)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "QuickTrainer": "quick_trainer",
    "Resume": "resume",
    "TrainPlan": "plan",
    "TrainSettings": "settings",
    "Trained": "run",
    "SimpleTrainer": "steps",
    "load_dataset": "steps",
    "load_model": "steps",
    "make_plan": "plan",
    "prepare_dataset": "steps",
    "run_post_training": "post_training",
    "train": "run",
}
_FORMER_NAMES = {"follow": "run_post_training"}  # of version 0.1
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    name = _FORMER_NAMES.get(name, name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mergeforge.train' has no attribute {name!r}")
    return getattr(import_module(f"mergeforge.train.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
