"""Run a training and read what it wrote."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mergeforge.train.plan import make_plan
from mergeforge.train.resume import Resume
from mergeforge.train.run import Trained, train


def run(settings: dict[str, Any], resume: Resume | None = None, listeners: Any = (), **changes: Any) -> Trained:
    """Train on the CPU with these settings and changes to them."""
    return train(make_plan(settings | changes, device="cpu"), resume, listeners)


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in a run's folder."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def metric_values(folder: Path, key: str = "loss") -> list[float]:
    """The values of a key in the metrics.jsonl of a run's folder, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def losses(trained: Trained, key: str = "loss") -> list[float]:
    return metric_values(trained.folder.root, key)


def have_same_adapter(first: Trained, second: Trained) -> bool:
    """Whether the adapters of two runs are equal bit for bit."""
    tensors, others = (adapter_tensors(trained.folder.root) for trained in (first, second))
    return tensors.keys() == others.keys() and all(tensors[name].equal(others[name]) for name in tensors)


def interrupt_at(step: int) -> Any:
    """A listener that presses Ctrl-C after a step."""

    def listen(line: dict[str, Any]) -> None:
        if line.get("step") == step and "loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    return listen
