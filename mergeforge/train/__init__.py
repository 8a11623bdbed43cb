"""The companion: trains the adapters that the engine merges. Needs the extra `train`.

settings -> planning -> running -> flow: what is asked for, what is decided, the run, and what follows it. Torch's part
lies in `steps/`.

    from mergeforge.train import follow, make_plan, train
    plan = make_plan("train.yaml")
    trained = train(plan)
    follow(plan, plan.settings.after)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "QuickTrainer": "quick_trainer",
    "Resume": "resume",
    "TrainPlan": "plan",
    "TrainSettings": "settings",
    "Trained": "run",
    "follow": "post_training",
    "make_plan": "plan",
    "train": "run",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mergeforge.train' has no attribute {name!r}")
    return getattr(import_module(f"mergeforge.train.{_NAMES[name]}"), name)
