"""Runs a training and reads what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mergeforge.train.plan import make_plan
from mergeforge.train.resume import Resume
from mergeforge.train.run import Trained, train


def run(settings: dict[str, Any], resume: Resume | None = None, listeners: Any = (), **changed: Any) -> Trained:
    return train(make_plan(settings | changed, device="cpu"), resume, listeners)


def adapter(trained: Trained) -> dict[str, Tensor]:
    return load_file(trained.folder.adapter / "adapter_model.safetensors")


def lines(trained: Trained, key: str = "loss") -> list[float]:
    """The values of a key in metrics.jsonl, in order."""
    return values(trained.folder.metrics, key)


def values(path: Path, key: str) -> list[float]:
    every = [json.loads(line) for line in path.read_text().splitlines()]
    return [line[key] for line in every if key in line]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
