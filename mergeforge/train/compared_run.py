"""ComparedRun: the part of a verdict that compares the validation rows before and after training."""

from __future__ import annotations

from dataclasses import dataclass, field

from mergeforge.eval.bootstrap import MIN_ROWS, ConfidenceInterval
from mergeforge.train.loss_curve import LossCurve


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """`interval`: of the difference between before and after; None where there is no validation data.

    `curve`: the validations during training.
    """

    rows: int = 0
    interval: ConfidenceInterval | None = None
    curve: LossCurve = field(default_factory=LossCurve)

    @property
    def comparison(self) -> str:
        """better, worse or no difference: the trained model against its start; "" where it is not known."""
        return self.interval.verdict if self.interval else ""

    @property
    def is_worse(self) -> bool:
        return self.comparison == "worse"

    def compared_with(self, start: str, measured: str) -> str:
        """The comparison in words. `measured`: the values before and after."""
        if not self.interval:
            return f"there is no validation data to compare with {start}: add val: 0.1"
        words = {"better": f"better than {start}", "worse": f"worse than {start}"}
        found = words.get(self.comparison, f"not clearly different from {start}")
        bounds = f"{self.interval.low:+.4f} to {self.interval.high:+.4f}"
        interval = f"{self.interval.difference:+.4f}, 95 % interval {bounds}, {self.rows} rows"
        few = f"; fewer than {MIN_ROWS} rows: the interval is often too narrow" if self.rows < MIN_ROWS else ""
        return f"{found}: {measured} ({interval}{few})"
