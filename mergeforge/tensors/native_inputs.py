"""Kernels that read the stored inputs of a merge straight from their bytes (kernels.c), in memory or in files.

torch makes one pass over memory for every operation, so that an average of three models moves ten times the bytes
of its inputs. Here one loop takes a few thousand elements, which stay in the first cache, through everything:
widened to float32, less the base, weighted, added up, rounded. The numbers are torch's, bit for bit; inner products
are added up in float64 on both sides. What lies in files is read in steps that stay in the second cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mergeforge.methods._weighted_sum import WeightedSum
from mergeforge.native.bindings import CHUNK, PRODUCT_CHUNK, ReductionArgs, kernels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]
    Doubles = NDArray[np.float64]
    Floats = NDArray[np.float32]
    Integers = NDArray[np.int64]
    Bits = NDArray[np.int32]

F = TypeVar("F", "Tensor", "Floats")
KINDS = {"BF16": 0, "F16": 1, "F32": 2}  # what kernels read and write, and its number in kernels.c
WIDEST = 4  # bytes of an element
READ_NBYTES = 1 << 20  # of all inputs together, that are read at a time
MEMORY = -1  # instead of a file
# struct range of kernels.c
RANGE = [("input", "i8"), ("low", "i4"), ("high", "i4"), ("inside", "i8"), ("found", "i8"), ("beyond", "i8")]


class UnreadableInput(Exception):
    """Input number `at` could not be read from its file."""

    def __init__(self, at: int) -> None:
        super().__init__(f"input {at} cannot be read")
        self.at = at


@dataclass(frozen=True)
class NativeInput:
    """A tensor's rows, from one on: bytes in memory, or of a file from `offset` on."""

    dtype: str
    held: Bytes | None = None
    file: int = MEMORY
    offset: int = 0

    @property
    def row(self) -> tuple[int, int, int]:
        """struct input of kernels.c."""
        start = self.offset if self.held is None else self.held.ctypes.data
        return self.file, start, KINDS[self.dtype]


class NativeInputs:
    """The same rows of several tensors, as they are stored; the base, if inputs are taken less it, is the last.

    `first`: the number of the row that the places begin with; `room`: of room_nbytes(), for tensors in files. Functions
    of rows [start, stop) raise Unreadable.
    """

    def __init__(
        self, places: Sequence[NativeInput], columns: int, *, based: bool, first: int, room: Bytes | None = None
    ) -> None:
        import numpy as np

        self.places = places  # holds the bytes
        self.columns = columns
        self.based = based
        self.first = first
        self.inputs = len(places) - based
        self._table = np.array([one.row for one in places], np.int64)
        self._widths = np.array([columns * (WIDEST if one.dtype == "F32" else 2) for one in places], np.int64)
        self._room = np.empty(0, np.uint8) if room is None else room
        self._step = len(self._room) // (len(places) * WIDEST) // CHUNK * CHUNK
        self._found = np.empty(len(places), np.int64)

    def weighted(
        self, terms: WeightedSum, start: int, stop: int, dtype: str, out: Bytes | Tensor, changes: Doubles | None = None
    ) -> float:
        """Put `terms` of the rows, plus the base if there is one, rounded to a dtype, into `out`.

        Returns the largest magnitude before it was rounded, or NaN. To `changes` is added what the terms make of the
        base: (sum of its squares, sum of the changes' squares, the largest change (not added), elements that change,
        those of them that do not once they are rounded).
        """
        import numpy as np

        most = ctypes.c_uint32()
        length = self._length(start, stop)
        self._call("weighted_sum", start, stop, self._sum(terms, start), length, KINDS[dtype], out, most, changes)
        return float(np.uint32(most.value).view(np.float32))

    def masses(self, terms: WeightedSum, start: int, stop: int) -> Doubles:
        """The sum of each input's magnitudes, and of those of elements that the terms keep: (inputs, 2)."""
        import numpy as np

        found = np.zeros((self.inputs, 2))
        self._call("masses", start, stop, self._sum(terms, start), self._length(start, stop), found)
        return found

    def rows(self, at: int, start: int, stop: int, out: F) -> F:
        """Rows of input `at`, less the base if there is one, or of the base, into `out` (float32)."""
        pair = [at, len(self.places) - 1]
        based = self.based and at < self.inputs
        self._call("difference", start, stop, based, self._length(start, stop), out, of=pair)
        return out

    def split(self, ranges: Sequence[tuple[int, int, int]], start: int, stop: int) -> list[tuple[int, Bits]]:
        """For each (input, low, high), in the inputs' order: how many magnitudes have bits of `high` at least, and the
        bits of those in [low, high), less `low`."""
        import numpy as np

        length = self._length(start, stop)
        inside = [np.empty(length, np.int32) for _ in ranges]
        rows = [(*one, into.ctypes.data, 0, 0) for one, into in zip(ranges, inside, strict=True)]
        table = np.array(rows, RANGE)
        self._call("split_inputs", start, stop, self.inputs, self.based, length, table, len(table))
        counts = zip(table["beyond"].tolist(), table["found"].tolist(), inside, strict=True)
        return [(beyond, into[:found]) for beyond, found, into in counts]

    def products(self, start: int, stop: int) -> Doubles:
        """The inner products of each input with itself and those that follow it."""
        import numpy as np

        room, sums = np.empty(self.inputs * PRODUCT_CHUNK), np.zeros(self.inputs * (self.inputs + 1) // 2)
        length = self._length(start, stop)
        self._call("inner_products", start, stop, self.inputs, self.based, length, room, sums)
        return sums

    def _call(self, name: str, start: int, stop: int, *arguments: Any, of: Sequence[int] | None = None) -> None:
        """A kernel on rows (`of` some of the tensors alone), and what it needs to fetch them."""
        step, inputs = self._step or self._length(start, stop), self._from(start)
        chosen = inputs if of is None else inputs[of]
        if failed := getattr(kernels(), name)(chosen, *arguments, step, self._room, self._found):
            raise UnreadableInput(failed - 1 if of is None else of[failed - 1])

    def _sum(self, terms: WeightedSum, start: int) -> ReductionArgs:
        """The sum for kernels whose number 0 is the first of row `start`."""
        import numpy as np

        factors, weights = (np.array(one, np.float32) for one in (terms.factors, terms.elected))
        masks = np.array([[*one.upper, *one.lower, one.limit] for one in terms.kept], np.uint32)
        bands = np.empty((0, 6), np.int64) if terms.bands is None else terms.bands
        lengths = [len(one) for one in (factors, masks, bands, weights)]
        if lengths[0] != self.inputs or not {*lengths[1:]} <= {0, self.inputs}:  # C would read beyond: a bug
            raise AssertionError(f"factors, masks, bands, weights: {lengths} for {self.inputs} inputs")
        products = np.empty((len(weights), CHUNK), np.float32)
        chunks = np.array([one.ctypes.data for one in products], np.int64)
        made = ReductionArgs(
            inputs=self.inputs,
            based=self.based,
            fused=terms.fused,
            element=start * self.columns,
            normalize=terms.normalize,
            divisor=terms.divisor("F32"),
            scale=terms.scale,
            swaps=terms.near is not None,
            near=terms.near or 0.0,
        )
        made.keep_alive(factors=factors, masks=masks, bands=bands, weights=weights, products=chunks)
        made.chunks = products  # which live as long, too
        return made

    def _length(self, start: int, stop: int) -> int:
        return (stop - start) * self.columns

    def _from(self, start: int) -> Integers:
        """Where each tensor's row `start` lies."""
        table = self._table.copy()
        table[:, 1] += (start - self.first) * self._widths
        return table


def read_buffer_nbytes(count: int) -> int:
    """The room that reading `count` tensors from files takes."""
    return max(READ_NBYTES, count * CHUNK * WIDEST)
