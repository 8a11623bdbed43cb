"""Lines of progress: which steps are printed, of how many, and the time left."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mergeforge.train import progress


def metrics(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, "lr": 1e-4, "tokens_per_second": 100.0, "memory": 1_000_000_000}


def test_prints_some_steps_and_every_validation_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 4 seconds; the run turns out to have 7 steps instead of 6."""
    clock = iter(range(0, 400, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    lines = progress.ProgressLines(6, out)
    lines({"total_steps": 7})
    for step in range(1, 8):
        lines(metrics(step))
    lines({"step": 7, "eval_loss": 1.5})
    lines({"note": "out of memory"})
    text = "loss 2.0000, lr 1.00e-04, 100 tokens/s, 1.0 GB"
    assert out.getvalue().splitlines() == [
        f"step 1 of 7: {text}",
        f"step 4 of 7: {text}, 12 s left",
        f"step 7 of 7: {text}",
        "step 7 of 7: validation loss 1.5000",
        "out of memory",
    ]
