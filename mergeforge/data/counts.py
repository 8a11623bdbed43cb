"""What became of every row, and how long the examples are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mergeforge.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_SKIPPED = 8  # reasons of each kind that are kept, with the place of their first row
MAX_SKIPPED_SHARE = 0.1
SKIP_KINDS = ("empty", "too_long", "bad")


@dataclass(frozen=True)
class Skipped:
    """A row that is not trained on: `kind` is bad, empty or too_long.

    `more`: how many later rows have the same reason.
    """

    place: str
    kind: str
    why: str
    more: int = 0

    @property
    def text(self) -> str:
        """The reason, and how many rows share it."""
        return f"{self.why} (and {self.more:,} more)" if self.more else self.why


@dataclass(frozen=True)
class DataStats:
    """Rows by what became of them, and the tokens of the examples.

    rows = used + empty + too_long + bad. `duplicates`: used rows equal to an earlier one (trained on like any other).
    `cut`: examples that lost tokens, or texts cut into chunks. `p50`, `p95`, `p99`, `longest`: tokens of an example.
    `histogram`: (upper bound in tokens, examples). `skipped`: the first row of each reason.
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
    sources: Mapping[str, DataStats] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def stats_from_dict(value: Mapping[str, Any]) -> DataStats:
    """The inverse of `DataStats.as_dict`."""
    nested = {
        "histogram": tuple((bound, count) for bound, count in value["histogram"]),
        "skipped": tuple(Skipped(**row) for row in value["skipped"]),
        "sources": {name: stats_from_dict(stats) for name, stats in value["sources"].items()},
    }
    return DataStats(**{**value, **nested})


def refuse_many_skips(counts: DataStats) -> None:
    """Raise SourceError if more than MAX_SKIPPED_SHARE of the rows of a source are not trained on."""
    for name, stats in counts.sources.items():
        if stats.rows - stats.used > MAX_SKIPPED_SHARE * stats.rows:
            what = f"{stats.rows - stats.used:,} of {stats.rows:,} rows of {name} would not be trained on"
            hint = "repair them, or pass --allow-skips (allow_skips: true)"
            if stats.too_long > (stats.rows - stats.used) / 2:
                hint = "use a larger seq_len or too_long: cut_prompt, or pass --allow-skips (allow_skips: true)"
            lines = "\n".join(f"  {row.place}: {row.text}" for row in stats.skipped[:MAX_SKIPPED])
            raise SourceError(f"{what}:\n{lines}", hint=hint)


class RecordCounter:
    """Counts the rows of one source as they come."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._reasons: dict[tuple[str, str], list[Any]] = {}  # (kind, why) -> the first place, rows

    def skip(self, place: str, kind: str, why: str) -> None:
        self.kinds[kind] += 1
        if (kind, why) in self._reasons:
            self._reasons[kind, why][1] += 1
        elif sum(known == kind for known, _ in self._reasons) < MAX_SKIPPED:
            self._reasons[kind, why] = [place, 1]

    @property
    def skipped(self) -> list[Skipped]:
        """The first rows of each kind that have different reasons."""
        return [Skipped(place, kind, why, rows - 1) for (kind, why), (place, rows) in self._reasons.items()]

    @property
    def rows(self) -> int:
        """Rows so far."""
        return self.kinds["used"] + sum(self.kinds[kind] for kind in SKIP_KINDS)

    def stats(self, lengths: NDArray[np.int64], trained: int, keys: NDArray[np.uint64]) -> DataStats:
        """The statistics, given the examples' lengths and one key per used row (equal for equal rows)."""
        import numpy as np

        used = self.kinds["used"]
        return DataStats(
            rows=self.rows,
            used=used,
            empty=self.kinds["empty"],
            too_long=self.kinds["too_long"],
            bad=self.kinds["bad"],
            duplicates=used - len(np.unique(keys)),
            cut=self.kinds["cut"],
            trained=trained,
            skipped=tuple(self.skipped),
            **length_stats(lengths),
        )


def length_stats(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """The fields of DataStats that follow from the lengths."""
    import numpy as np

    if not len(lengths):
        return {}
    p50, p95, p99 = (int(value) for value in np.percentile(lengths, [50, 95, 99], method="inverted_cdf"))
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
    """(upper bound in tokens, examples): at most `bars` equal bins, 1, 2, 2.5 or 5 times a power of ten wide."""
    import numpy as np

    width = next(width for width in _round_widths() if width * bars >= longest)
    edges = np.arange(0, longest + width, width)
    counts = np.bincount((lengths - 1) // width, minlength=len(edges) - 1)
    return tuple((int(edge), int(count)) for edge, count in zip(edges[1:], counts, strict=True))


def _round_widths() -> Sequence[int]:
    return [int(factor * 10**power) for power in range(1, 12) for factor in (1, 2, 2.5, 5)]


def total_stats(sources: Mapping[str, DataStats], lengths: NDArray[np.int64], keys: NDArray[np.uint64]) -> DataStats:
    """The statistics of all sources together. keys: one per used row."""
    import numpy as np

    parts = list(sources.values())
    sums = {
        name: sum(getattr(part, name) for part in parts) for name in ("rows", "used", *SKIP_KINDS, "cut", "trained")
    }
    return DataStats(
        **sums,
        duplicates=sums["used"] - len(np.unique(keys)),
        skipped=tuple(row for part in parts for row in part.skipped),
        sources=dict(sources),
        **length_stats(lengths),
    )
