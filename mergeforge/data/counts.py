"""Counting: what became of every row, and how long the examples are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHOWN = 8  # of each kind, the first that are kept with their place
KINDS = ("empty", "too_long", "bad")


@dataclass(frozen=True)
class Skipped:
    """A row that is not trained on: `kind` is bad, empty or too_long."""

    place: str
    kind: str
    why: str


@dataclass(frozen=True)
class Counts:
    """Rows by what became of them, and the examples' tokens.

    rows = used + empty + too_long + bad. `duplicates`: of the used rows, those that are the same as an earlier one
    (they are trained on like any other). `cut`: examples that lost tokens, or texts cut into pieces. `p50`, `p95`,
    `p99`, `longest`: tokens of an example. `histogram`: (tokens up to and with, examples). `skipped`: the first of
    each kind.
    """

    rows: int = 0
    used: int = 0
    empty: int = 0
    too_long: int = 0
    bad: int = 0
    duplicates: int = 0
    cut: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    p50: int = 0
    p95: int = 0
    p99: int = 0
    longest: int = 0
    histogram: tuple[tuple[int, int], ...] = ()
    skipped: tuple[Skipped, ...] = ()
    sources: Mapping[str, Counts] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def counts_of(value: Mapping[str, Any]) -> Counts:
    """Counts as `json` gave them."""
    inner = {
        "histogram": tuple((upto, count) for upto, count in value["histogram"]),
        "skipped": tuple(Skipped(**one) for one in value["skipped"]),
        "sources": {name: counts_of(one) for name, one in value["sources"].items()},
    }
    return Counts(**{**value, **inner})


class Tally:
    """Counts one source's rows as they come."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.skipped: list[Skipped] = []

    def skip(self, place: str, kind: str, why: str) -> None:
        self.kinds[kind] += 1
        if self.kinds[kind] <= SHOWN:
            self.skipped.append(Skipped(place, kind, why))

    @property
    def rows(self) -> int:
        """How many there were so far."""
        return self.kinds["used"] + sum(self.kinds[kind] for kind in KINDS)

    def counts(self, lengths: NDArray[np.int64], trained: int, keys: NDArray[np.uint64]) -> Counts:
        """With the lengths of the source's examples, and a key a used row that is the same for equal ones."""
        import numpy as np

        used = self.kinds["used"]
        return Counts(
            rows=self.rows,
            used=used,
            empty=self.kinds["empty"],
            too_long=self.kinds["too_long"],
            bad=self.kinds["bad"],
            duplicates=used - len(np.unique(keys)),
            cut=self.kinds["cut"],
            trained=trained,
            skipped=tuple(self.skipped),
            **length_counts(lengths),
        )


def length_counts(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """The counts that lengths alone give."""
    import numpy as np

    if not len(lengths):
        return {}
    p50, p95, p99 = (int(one) for one in np.percentile(lengths, [50, 95, 99], method="inverted_cdf"))
    longest = int(lengths.max())
    return {
        "examples": len(lengths),
        "tokens": int(lengths.sum()),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "longest": longest,
        "histogram": histogram(lengths, longest),
    }


def histogram(lengths: NDArray[np.int64], longest: int, bars: int = 12) -> tuple[tuple[int, int], ...]:
    """(tokens up to and with, examples): at most `bars` steps of one width, 1, 2, 2.5 or 5 times a power of ten."""
    import numpy as np

    width = next(step for step in _steps() if step * bars >= longest)
    edges = np.arange(0, longest + width, width)
    counted = np.bincount((lengths - 1) // width, minlength=len(edges) - 1)
    return tuple((int(edge), int(count)) for edge, count in zip(edges[1:], counted, strict=True))


def _steps() -> Sequence[int]:
    return [int(part * 10**power) for power in range(1, 12) for part in (1, 2, 2.5, 5)]


def total_of(counted: Mapping[str, Counts], lengths: NDArray[np.int64], keys: NDArray[np.uint64]) -> Counts:
    """All sources together. `keys`: a key a used row, over all of them."""
    import numpy as np

    parts = list(counted.values())
    sums = {name: sum(getattr(one, name) for one in parts) for name in ("rows", "used", *KINDS, "cut", "trained")}
    return Counts(
        **sums,
        duplicates=sums["used"] - len(np.unique(keys)),
        skipped=tuple(one for part in parts for one in part.skipped),
        sources=dict(counted),
        **length_counts(lengths),
    )
