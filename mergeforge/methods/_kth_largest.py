"""The k-th largest of many numbers that arrive in chunks, exactly and without sorting them all.

Numbers are non-negative integers: the bits of float32 magnitudes. A small sample gives a narrow bracket
around the k-th; one scan counts what lies above the bracket and collects what lies inside: as it is while it
is little, else as a histogram (bfloat16 models differ in few distinct values), whose values become coarser
while there are too many. If the sample misled (the k-th is outside) or the histogram had to be coarse,
another scan narrows the bracket, until one number is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bits = NDArray[np.int32]

MAX_CANDIDATES = 1 << 19  # magnitudes that a search keeps as they are
MAX_DISTINCT = 1 << 16  # distinct values in a histogram
BITS_LIMIT = 0x7F800001  # one more than the bits of infinity
INFINITE_THRESHOLD = (BITS_LIMIT - 1, 0, 1)  # the result for k = 0
SEARCH_NBYTES = 3 * 4 * MAX_CANDIDATES  # one search holds candidates, the positions where their values change, counts


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
    `result`: these bits, how many of the elements with these bits are among the k, and how many there are.
    """

    k: int
    numel: int
    nonzero_fraction: float | None = None
    nonzero: int = 0
    low: int = 0
    high: int = BITS_LIMIT
    above: int = 0
    histogram: _MagnitudeHistogram | None = None
    candidates: Bits | None = None  # one array: small ones between the blocks of a merge would fragment its memory
    candidate_count: int = 0
    result: tuple[int, int, int] | None = None

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

    def start_scan(self) -> None:
        import numpy as np

        self.above, self.nonzero, self.histogram = 0, 0, None
        self.candidates, self.candidate_count = np.empty(MAX_CANDIDATES, np.int32), 0

    def add(self, above: int, inside: Bits, nonzero: int = 0) -> None:
        """Add a chunk: how many bits are above the range, and those inside it, minus `low`."""
        assert self.candidates is not None
        self.above += above
        self.nonzero += nonzero
        if self.candidate_count + len(inside) > MAX_CANDIDATES:
            self._count(self.candidates[: self.candidate_count])
            self.candidate_count = 0
        if len(inside) > MAX_CANDIDATES:
            self._count(inside)
        else:
            self.candidates[self.candidate_count : self.candidate_count + len(inside)] = inside
            self.candidate_count += len(inside)

    def finish_scan(self) -> None:
        """Set the result, or narrow the range, or replace a range that does not hold the threshold.

        Raises ArithmeticError where the threshold is NaN.
        """
        if self.nonzero_fraction is not None:
            self.k = int(self.nonzero_fraction * self.nonzero)
        if self.k == 0:
            self.result = INFINITE_THRESHOLD
            return
        inside = self.candidate_count + (int(self.histogram.counts.sum()) if self.histogram else 0)
        if self.above >= self.k and self.high >= BITS_LIMIT:
            raise ArithmeticError("a task vector contains NaN values")
        if self.above >= self.k:
            self.low, self.high = self.high, BITS_LIMIT
        elif self.above + inside < self.k:
            self.low, self.high = 0, self.low
        elif self.histogram:
            self._narrow()
        else:
            self._select()
        self.histogram = self.candidates = None

    def _count(self, bits: Bits) -> None:
        """Move candidates into the histogram."""
        import numpy as np

        self.histogram = self.histogram or _MagnitudeHistogram(np.empty(0, np.int32), np.empty(0, np.int64))
        self.histogram.add(bits)

    def _select(self) -> None:
        """Take the threshold from the candidates, which are complete."""
        import numpy as np

        assert self.candidates is not None
        bits = self.candidates[: self.candidate_count]
        bits.sort()
        value = bits[len(bits) - (self.k - self.above)]
        first, end = np.searchsorted(bits, [value, value + 1])
        self.result = (self.low + int(value), self.k - self.above - (len(bits) - int(end)), int(end - first))

    def _narrow(self) -> None:
        """Narrow the range to one value of the histogram."""
        assert self.histogram is not None and self.candidates is not None
        self._count(self.candidates[: self.candidate_count])
        counts, shift = self.histogram.counts, self.histogram.shift
        reached = counts[::-1].cumsum() + self.above  # how many at or above each value, from the top
        index = len(counts) - 1 - int((reached >= self.k).argmax())
        value, count = int(self.histogram.values[index]), int(counts[index])
        above = int(reached[len(counts) - 1 - index]) - count
        if shift == 0:
            self.result = (self.low + value, self.k - above, count)
        self.low, self.high = self.low + (value << shift), min(self.high, self.low + (value + 1 << shift))
