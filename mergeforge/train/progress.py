"""Metrics of a run as text, and a listener that prints them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from mergeforge.core.sizes import format_size
from mergeforge.train.objectives import REWARD_METRICS

LINE_SECONDS = 10.0  # between two lines of steps
TOTAL = "total_steps"  # the key of the line that says how many steps a run has


def metrics_text(line: Mapping[str, Any]) -> str:
    """A line of metrics for people."""
    if "note" in line:
        return str(line["note"])
    if "eval_loss" in line:
        return f"validation loss {line['eval_loss']:.4f}{_rewards(line, 'eval_')}"
    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
    return f"loss {line['loss']:.4f}{_rewards(line)}, lr {line['lr']:.2e}, {speed}, {format_size(line['memory'])}"


def _rewards(line: Mapping[str, Any], prefix: str = "") -> str:
    """Margin and accuracy of a preference objective."""
    names = [name for name in REWARD_METRICS if prefix + name in line]
    return "".join(f", {name} {line[prefix + name]:.3f}" for name in names)


def is_kept(line: Mapping[str, Any]) -> bool:
    """Whether a line stays visible: a note or a validation loss, as opposed to one step of many."""
    return "loss" not in line and TOTAL not in line


def duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


class ProgressLines:
    """A listener that prints the first step, the last one, one now and then, every validation loss and every note."""

    def __init__(self, total: int, file: TextIO | None = None) -> None:
        self._total = total
        self._file = file
        self._started: tuple[int, float] | None = None  # the first step, and when it ended
        self._last = float("-inf")

    def __call__(self, line: Mapping[str, Any]) -> None:
        if TOTAL in line:
            self._total = line[TOTAL]
            return
        step, now = int(line.get("step", 0)), time.monotonic()
        self._started = self._started or ((step, now) if "loss" in line else None)
        if is_kept(line) or step == self._total or now - self._last > LINE_SECONDS:
            self._last = now if "loss" in line else self._last
            place = f"step {step} of {self._total}: " if step else ""
            print(f"{place}{metrics_text(line)}{self._eta(step, now)}", file=self._file or sys.stderr, flush=True)

    def _eta(self, step: int, now: float) -> str:
        """How long the rest takes at the speed so far; "" before the second step and after the last."""
        if self._started is None or not self._started[0] < step < self._total:
            return ""
        first, started = self._started
        return f", {duration((now - started) / (step - first) * (self._total - step))} left"
