"""The k-th largest of many numbers that arrive in chunks, exactly and without sorting them all.

Numbers are non-negative integers: the bits of float32 magnitudes. A small sample gives a narrow bracket
around the k-th; one scan counts what lies above the bracket and collects what lies inside: as it is while it
is little, else as a histogram (bfloat16 models differ in few distinct values), whose values become coarser
while there are too many. If the sample misled (the k-th is outside) or the histogram had to be coarse,
another scan narrows the bracket, until one number is left.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bits = NDArray[np.int32]

MAX_CANDIDATES = 1 << 19  # magnitudes that a search keeps as they are
MIN_ROOM = 1 << 12  # candidates that there is room for, whatever MAX_CANDIDATES is
MAX_DISTINCT = 1 << 16  # distinct values in a histogram
BITS_LIMIT = 0x7F800001  # one more than the bits of infinity
SEARCH_NBYTES = 3 * 4 * MAX_CANDIDATES  # one search holds candidates, the positions where their values change, counts


@dataclass
class Threshold:
    """The k-th largest magnitude: its float32 bits, how many of its ties are kept (the first ones), how many there are.

    `ties_seen`: ties in the blocks that were trimmed since the tensor's first one.
    """

    bits: int
    ties_kept: int
    ties: int
    ties_seen: int = 0

    @property
    def value(self) -> float:
        """The magnitude itself."""
        value: float = struct.unpack("<f", struct.pack("<I", self.bits))[0]
        return value


def infinite_threshold() -> Threshold:
    """The threshold for k = 0, which nothing reaches."""
    return Threshold(BITS_LIMIT - 1, 0, 1)


@dataclass
class _MagnitudeHistogram:
    """How often each number occurred: at first exactly, then divided by 2**shift and rounded down."""

    values: Bits
    counts: NDArray[np.int64]
    shift: int = 0

    def add(self, bits: Bits) -> None:
        """Count more numbers; overwrites them."""
        import numpy as np

        bits >>= np.int32(self.shift)
        bits.sort()
        while np.count_nonzero(bits[1:] != bits[:-1]) >= MAX_DISTINCT:
            self._coarsen(bits, 1)
        first = _first_positions(bits)
        self._merge(bits[first], np.diff(first, append=len(bits)))
        while len(self.values) > MAX_DISTINCT:
            self._coarsen(self.values, 1)
            self._merge(self.values[:0], self.counts[:0])

    def add_equal(self, value: int, count: int) -> None:
        """Count a number that occurred so often."""
        import numpy as np

        self._merge(np.array([value >> self.shift], np.int32), np.array([count]))

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
        first = _first_positions(values)
        self.values, self.counts = values[first], np.add.reduceat(counts, first)


def _first_positions(ordered: Bits) -> NDArray[np.int64]:
    """The position of the first occurrence of each value."""
    import numpy as np

    changes = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=changes[1:])
    return np.flatnonzero(changes)


@dataclass
class KthLargestSearch:
    """Narrows [low, high) to the bits of the k-th largest of `numel` magnitudes.

    With a `nonzero_fraction`, k is that fraction of the nonzero magnitudes, which a scan counts too.

    A scan adds what it sees with add(), or makes room and appends to `candidates` and `counts` itself, as the C library
    does: the magnitudes' bits inside the range, minus `low`; and how many these are, how many magnitudes are above the
    range, how many have exactly the bits of `guess` (these are not appended), and how many are not zero.
    """

    k: int
    numel: int
    nonzero_fraction: float | None = None
    low: int = 0
    high: int = BITS_LIMIT
    guess: int = 0
    histogram: _MagnitudeHistogram | None = None
    candidates: Bits | None = None  # one array: small ones between the blocks of a merge would fragment its memory
    counts: NDArray[np.int64] | None = None
    result: Threshold | None = None

    def bracket(self, sample: Bits) -> None:
        """Start with the range that holds the threshold unless the sample (ascending) is unlike the tensor."""
        import numpy as np

        if self.nonzero_fraction is not None:
            self.k = int(self.nonzero_fraction * self.numel * np.count_nonzero(sample) / len(sample))
        rank = len(sample) * self.k / self.numel
        spread = 4.5 * math.sqrt(rank * max(1 - self.k / self.numel, 0)) + 8
        descending = sample[::-1]
        high = int(rank - spread)
        low = int(rank + spread)
        self.high = min(int(descending[high]) + 1, BITS_LIMIT) if high >= 0 else BITS_LIMIT
        self.low = min(int(descending[low]), self.high - 1) if low < len(descending) else 0
        self.guess = int(descending[min(int(rank), len(descending) - 1)])

    def start_scan(self) -> None:
        import numpy as np

        self.histogram = None
        self.candidates, self.counts = np.empty(max(MAX_CANDIDATES, MIN_ROOM), np.int32), np.zeros(4, np.int64)
        self.guess = min(max(self.guess, self.low), self.high - 1)

    def add(self, above: int, inside: Bits, nonzero: int) -> None:
        """Add a chunk: how many bits are above the range, those inside it, minus `low`, and how many are not zero."""
        assert self.candidates is not None and self.counts is not None
        self.counts[1:] += (above, 0, nonzero)
        if self.counts[0] + len(inside) > MAX_CANDIDATES:
            self.compact()
        if len(inside) > MAX_CANDIDATES:
            self._count(inside)
        else:
            count = int(self.counts[0])
            self.candidates[count : count + len(inside)] = inside
            self.counts[0] += len(inside)

    def make_room(self, count: int) -> None:
        """Make room for `count` more candidates (at most MIN_ROOM)."""
        assert self.candidates is not None and self.counts is not None
        if self.counts[0] + count > len(self.candidates):
            self.compact()

    def compact(self) -> None:
        """Move the candidates into the histogram."""
        assert self.candidates is not None and self.counts is not None
        self._count(self.candidates[: int(self.counts[0])])
        self.counts[0] = 0

    def finish_scan(self) -> None:
        """Set the result, or narrow the range, or replace a range that does not hold the threshold.

        Raises ArithmeticError where the threshold is NaN.
        """
        assert self.counts is not None
        candidate_count, above, equal, nonzero = self.counts.tolist()
        if self.nonzero_fraction is not None:
            self.k = int(self.nonzero_fraction * nonzero)
        if self.k == 0:
            self.result = infinite_threshold()
            return
        inside = candidate_count + equal + (int(self.histogram.counts.sum()) if self.histogram else 0)
        if above >= self.k and self.high >= BITS_LIMIT:
            raise ArithmeticError("a task vector contains NaN values")
        if above >= self.k:
            self.low, self.high = self.high, BITS_LIMIT
        elif above + inside < self.k:
            self.low, self.high = 0, self.low
        elif self.histogram:
            self._narrow(above, equal)
        else:
            self._select(candidate_count, above, equal)
        self.histogram = self.candidates = self.counts = None

    def _count(self, bits: Bits) -> None:
        import numpy as np

        if len(bits):
            self.histogram = self.histogram or _MagnitudeHistogram(np.empty(0, np.int32), np.empty(0, np.int64))
            self.histogram.add(bits)

    def _select(self, count: int, above: int, equal: int) -> None:
        """Take the threshold from the candidates and those `equal` to the guess, which are complete."""
        import numpy as np

        assert self.candidates is not None
        bits, guess, rank = self.candidates[:count], self.guess - self.low, self.k - above
        larger, ties = int(np.count_nonzero(bits > guess)), int(np.count_nonzero(bits == guess)) + equal
        value = guess
        if not larger < rank <= larger + ties:
            position = count - (rank if rank <= larger else rank - equal)
            bits.partition(position)
            value = int(bits[position])
            larger = int(np.count_nonzero(bits > value)) + (equal if value < guess else 0)
            ties = int(np.count_nonzero(bits == value))
        self.result = Threshold(self.low + value, rank - larger, ties)

    def _narrow(self, above: int, equal: int) -> None:
        """Narrow the range to one value of the histogram."""
        self.compact()
        assert self.histogram is not None
        self.histogram.add_equal(self.guess - self.low, equal)
        counts, shift = self.histogram.counts, self.histogram.shift
        reached = counts[::-1].cumsum() + above  # how many at or above each value, from the top
        index = len(counts) - 1 - int((reached >= self.k).argmax())
        value, count = int(self.histogram.values[index]), int(counts[index])
        larger = int(reached[len(counts) - 1 - index]) - count
        if shift == 0:
            self.result = Threshold(self.low + value, self.k - larger, count)
        self.low, self.high = self.low + (value << shift), min(self.high, self.low + (value + 1 << shift))
