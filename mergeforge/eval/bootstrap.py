"""Is a difference between two models more than chance? A paired bootstrap over rows.

Rows are drawn with replacement, the same rows for both models, and the ratio (nats per token, or bits per byte) of each
draw's sums is taken. The interval lies between the 2.5th and 97.5th percentiles of the differences (Efron and
Tibshirani 1993, chapter 13; Koehn 2004 for the pairing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWS, SEED = 2000, 0
MAX_COUNTS = 1 << 24  # row counts in memory at once
MIN_ROWS = 30  # with fewer rows the interval is too narrow more often than it claims


@dataclass(frozen=True)
class ConfidenceInterval:
    """The difference of two ratios, the bounds of its 95 % interval, and the margin that counts as a tie."""

    difference: float
    low: float
    high: float

    margin: float = 0.0

    @property
    def verdict(self) -> str:
        """worse if even the lower bound is above the margin, better if the upper one is below: lower is better."""
        return "worse" if self.low > self.margin else "better" if self.high < -self.margin else "no difference"


def paired_bootstrap(
    baseline: Sequence[tuple[float, float]],
    candidate: Sequence[tuple[float, float]],
    *,
    margin: float = 0.0,
    draws: int = DRAWS,
    seed: int = SEED,
) -> ConfidenceInterval:
    """How far the candidate's ratio is above the baseline's.

    Both hold (numerator, denominator) of the same rows in the same order.
    """
    import numpy as np

    first = np.array(baseline, np.float64).reshape(-1, 2)
    second = np.array(candidate, np.float64).reshape(-1, 2)
    if not np.isfinite(second).all():
        return ConfidenceInterval(np.inf, np.inf, np.inf, margin)  # not a number is worse than any number
    if not np.isfinite(first).all():
        return ConfidenceInterval(-np.inf, -np.inf, -np.inf, margin)
    sums = np.concatenate([first, second], axis=1)
    difference = float(_differences(sums.sum(0, keepdims=True))[0])
    if len(sums) < 2:
        return ConfidenceInterval(difference, -np.inf, np.inf, margin)
    random = np.random.default_rng(seed)
    step = max(1, MAX_COUNTS // len(sums))
    parts = []
    for start in range(0, draws, step):
        counts = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(step, draws - start))
        parts.append(_differences(counts @ sums))
    differences = np.concatenate(parts)
    low, high = np.percentile(differences[np.isfinite(differences)], [2.5, 97.5])
    return ConfidenceInterval(difference, float(low), float(high), margin)


def _differences(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold only rows without text, that is, 0 bytes
        differences: NDArray[np.float64] = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    return differences
