"""The k-th largest of many numbers that are seen piece by piece, exactly and without a sort of all.

Numbers are non-negative integers: the bits of float32 magnitudes. A small sample gives a narrow bracket
around the k-th; one look counts what lies above the bracket and keeps what lies inside: as it is while it
is little, else counted by values (there are few different ones between bfloat16 models), which are made
coarser while there are too many. If the sample misled (the k-th is outside) or values had to be coarse,
another look narrows the bracket, until one number is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bits = NDArray[np.int32]

CANDIDATES = 1 << 19  # magnitudes that a search keeps as they are
VALUES = 1 << 16  # different ones that it counts
ALL_BITS = 0x7F800001  # one more than the bits of infinity
NOTHING = (ALL_BITS - 1, 0, 1)  # what is found for k = 0: infinity
SEARCH_NBYTES = 3 * 4 * CANDIDATES  # what one search holds: candidates, where their values change, counts


@dataclass
class _Tally:
    """How often each number occurred: at first exactly, then divided by 2**shift and rounded down."""

    values: Bits
    counts: NDArray[np.int64]
    shift: int = 0

    def add(self, bits: Bits) -> None:
        """Count some more, which are overwritten."""
        import numpy as np

        bits >>= np.int32(self.shift)
        bits.sort()
        while np.count_nonzero(bits[1:] != bits[:-1]) >= VALUES:
            self._coarsen(bits, 1)
        first = _firsts(bits)
        self._merge(bits[first], np.diff(first, append=len(bits)))
        while len(self.values) > VALUES:
            self._coarsen(self.values, 1)
            self._merge(self.values[:0], self.counts[:0])

    def _coarsen(self, bits: Bits, by: int) -> None:
        import numpy as np

        self.shift += by
        bits >>= np.int32(by)
        if bits is not self.values:
            self.values >>= np.int32(by)

    def _merge(self, values: Bits, counts: NDArray[np.int64]) -> None:
        import numpy as np

        values, counts = np.concatenate([self.values, values]), np.concatenate([self.counts, counts])
        order = values.argsort(kind="stable")
        values, counts = values[order], counts[order]
        first = _firsts(values)
        self.values, self.counts = values[first], np.add.reduceat(counts, first)


def _firsts(ordered: Bits) -> NDArray[np.int64]:
    """Where each value first stands."""
    import numpy as np

    changes = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=changes[1:])
    return np.flatnonzero(changes)


@dataclass
class Search:
    """Narrows [low, high) to the bits of the k-th largest of `numel` magnitudes.

    With a `share`, k is that share of the magnitudes that are not zero, and a look counts them too.
    `found`: these bits, how many of the elements that have them are among the k, and how many there are.
    """

    keep: int
    numel: int
    share: float | None = None
    nonzero: int = 0
    low: int = 0
    high: int = ALL_BITS
    above: int = 0
    tally: _Tally | None = None
    waiting: Bits | None = None  # one array: small ones between the blocks of a merge would break up its memory
    held: int = 0
    found: tuple[int, int, int] | None = None

    def bracket(self, sample: Bits) -> None:
        """Start with the range that holds the threshold unless the sample (in rising order) is unlike the tensor."""
        import numpy as np

        if self.share is not None:
            self.keep = int(self.share * self.numel * np.count_nonzero(sample) / len(sample))
        rank = len(sample) * self.keep / self.numel
        spread = 4.5 * math.sqrt(rank * max(1 - self.keep / self.numel, 0)) + 8
        ordered = sample[::-1]
        high = int(rank - spread)
        low = int(rank + spread)
        self.high = min(int(ordered[high]) + 1, ALL_BITS) if high >= 0 else ALL_BITS
        self.low = min(int(ordered[low]), self.high - 1) if low < len(ordered) else 0

    def start(self) -> None:
        """Begin a look."""
        import numpy as np

        self.above, self.nonzero, self.tally, self.waiting, self.held = 0, 0, None, np.empty(CANDIDATES, np.int32), 0

    def add(self, above: int, inside: Bits, nonzero: int = 0) -> None:
        assert self.waiting is not None
        self.above += above
        self.nonzero += nonzero
        if self.held + len(inside) > CANDIDATES:
            self._count(self.waiting[: self.held])
            self.held = 0
        if len(inside) > CANDIDATES:
            self._count(inside)
        else:
            self.waiting[self.held : self.held + len(inside)] = inside
            self.held += len(inside)

    def finish(self) -> None:
        """After a look: the threshold is found, or the range is narrower, or it was the wrong one."""
        if self.share is not None:
            self.keep = int(self.share * self.nonzero)
        if self.keep == 0:
            self.found = NOTHING
            return
        inside = self.held + (int(self.tally.counts.sum()) if self.tally else 0)
        if self.above >= self.keep and self.high >= ALL_BITS:
            raise ArithmeticError("a task vector holds values that are not numbers (NaN)")
        if self.above >= self.keep:
            self.low, self.high = self.high, ALL_BITS
        elif self.above + inside < self.keep:
            self.low, self.high = 0, self.low
        elif self.tally:
            self._narrow()
        else:
            self._select()
        self.tally = self.waiting = None

    def _count(self, bits: Bits) -> None:
        """Turn candidates into counts."""
        import numpy as np

        self.tally = self.tally or _Tally(np.empty(0, np.int32), np.empty(0, np.int64))
        self.tally.add(bits)

    def _select(self) -> None:
        """All candidates are there: the threshold is one of them."""
        import numpy as np

        assert self.waiting is not None
        bits = self.waiting[: self.held]
        bits.sort()
        value = bits[len(bits) - (self.keep - self.above)]
        first, end = np.searchsorted(bits, [value, value + 1])
        self.found = (self.low + int(value), self.keep - self.above - (len(bits) - int(end)), int(end - first))

    def _narrow(self) -> None:
        assert self.tally is not None and self.waiting is not None
        self._count(self.waiting[: self.held])
        counts, shift = self.tally.counts, self.tally.shift
        reached = counts[::-1].cumsum() + self.above  # how many at or above each value, from the top
        at = len(counts) - 1 - int((reached >= self.keep).argmax())
        value, count = int(self.tally.values[at]), int(counts[at])
        above = int(reached[len(counts) - 1 - at]) - count
        if shift == 0:
            self.found = (self.low + value, self.keep - above, count)
        self.low, self.high = self.low + (value << shift), min(self.high, self.low + (value + 1 << shift))
