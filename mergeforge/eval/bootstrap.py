"""Is a difference between two models more than chance? A paired bootstrap over rows.

Rows are drawn with replacement, the same ones for both models, and the ratio (nats a token, or bits a byte) is taken
of each draw's sums. The interval lies between the 2.5th and 97.5th percentiles of the differences (Efron and
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
ELEMENTS = 1 << 24  # counts that are held at a time
FEWEST = 30  # rows; with fewer an interval is too narrow more often than it says


@dataclass(frozen=True)
class Interval:
    """The difference of two ratios, the bounds between which it lies in 95 of 100 draws, and what counts as none."""

    difference: float
    low: float
    high: float

    margin: float = 0.0

    @property
    def verdict(self) -> str:
        """worse where even the lower bound is above the margin, better where the upper one is below: less is better."""
        return "worse" if self.low > self.margin else "better" if self.high < -self.margin else "no difference"


def paired(
    one: Sequence[tuple[float, float]],
    other: Sequence[tuple[float, float]],
    *,
    margin: float = 0.0,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval:
    """How far `other`'s ratio is above `one`'s; both hold (above, below) of the same rows in the same order."""
    import numpy as np

    a, b = np.array(one, np.float64).reshape(-1, 2), np.array(other, np.float64).reshape(-1, 2)
    if not np.isfinite(b).all():
        return Interval(np.inf, np.inf, np.inf, margin)  # what is not a number is worse than any
    if not np.isfinite(a).all():
        return Interval(-np.inf, -np.inf, -np.inf, margin)
    sums = np.concatenate([a, b], axis=1)
    found = _differences(sums.sum(0, keepdims=True))[0]
    if len(sums) < 2:
        return Interval(float(found), -np.inf, np.inf, margin)
    random = np.random.default_rng(seed)
    step = max(1, ELEMENTS // len(sums))
    parts = []
    for start in range(0, draws, step):
        counts = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(step, draws - start))
        parts.append(_differences(counts @ sums))
    differences = np.concatenate(parts)
    low, high = np.percentile(differences[np.isfinite(differences)], [2.5, 97.5])
    return Interval(float(found), float(low), float(high), margin)


def _differences(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):  # rows without text alone have no bytes to divide by
        found: NDArray[np.float64] = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    return found
