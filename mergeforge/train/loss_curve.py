"""LossCurve: the validation losses of a run, and from where on it overfits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OVERFIT = 0.02  # of the loss, and fraction of the lowest validation loss, by which it must rise again to count


@dataclass(frozen=True)
class LossCurve:
    """The lowest (at `lowest_step`) and the last validation loss; `kept_step`: the step whose weights were kept."""

    lowest_loss: float | None = None
    lowest_step: int | None = None
    last_loss: float | None = None
    kept_step: int | None = None

    @property
    def overfits(self) -> bool:
        """Whether the validation loss rose again while training went on."""
        if self.lowest_loss is None or self.last_loss is None:
            return False
        return self.last_loss - self.lowest_loss > max(OVERFIT, OVERFIT * self.lowest_loss)

    def overfitting(self) -> str:
        """In words, from which step on it overfits; "" if it does not."""
        if not self.overfits:
            return ""
        text = f"it overfits after step {self.lowest_step}: the validation loss rises from {self.lowest_loss:.4f}"
        kept = f"step {self.kept_step} was kept" if self.kept_step == self.lowest_step else "the last step was kept"
        return f"{text} to {self.last_loss:.4f} ({kept}); use fewer epochs, more rows or a lower rank"


def loss_curve(metrics: Sequence[Mapping[str, Any]], kept_step: int | None) -> LossCurve:
    """The curve from the lines of metrics.jsonl."""
    validations = [(line["eval_loss"], line["step"]) for line in metrics if "eval_loss" in line]
    if not validations:
        return LossCurve(kept_step=kept_step)
    lowest, step = min(validations)
    return LossCurve(lowest, step, validations[-1][0], kept_step)


def first_and_last(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """The means of a metric over the first and over the last steps; None where no step has it."""
    values = [line[name] for line in metrics if name in line]
    if not values:
        return None, None
    window = max(1, min(10, len(values) // 4))
    return sum(values[:window]) / window, sum(values[-window:]) / window
