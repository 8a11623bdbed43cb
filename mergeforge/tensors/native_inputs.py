"""Inputs of a merge as the C library reads them: straight from their bytes, in memory or in files.

torch makes one pass over memory per operation, so an average of three models moves ten times the bytes of its inputs.
The C library takes a few thousand elements, which stay in the L1 cache, through all steps at once: widen to float32,
subtract the base, weight, add, round. The results equal torch's bit for bit; inner products are summed in float64 in
both. Tensors in files are read in steps that stay in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.methods.keep import KeepRanks
from mergeforge.methods.kth_largest import KthLargestSearch
from mergeforge.methods.reduction import Reduction
from mergeforge.native.bindings import CHUNK, kernels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Doubles = NDArray[np.float64]
    Floats = NDArray[np.float32]

ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4}  # dtypes that the C library reads and writes
MAX_ITEMSIZE = 4  # bytes of an element
MAX_RANK_BITS_NBYTES = 2 << 20  # of each input
READ_NBYTES = 1 << 20  # bytes of all inputs together that are read at a time


class UnreadableInput(Exception):
    """Input number `index` could not be read from its file."""

    def __init__(self, index: int) -> None:
        super().__init__(f"input {index} cannot be read")
        self.index = index


@dataclass(frozen=True)
class NativeInput:
    """Consecutive rows of a tensor: bytes in memory, or a file descriptor; from byte `offset` on."""

    dtype: str
    source: Bytes | int
    offset: int = 0


@dataclass(frozen=True)
class NativeInputs:
    """The same rows of several tensors; if there is a base to subtract, it is the last one.

    `first_row`: the number of the row that the tensors' bytes start with. `row_length`: elements of a row, in which
    magnitudes are ranked. `read_buffer`: read_buffer_nbytes() bytes, needed for tensors in files. Methods that take
    rows [start, stop) raise UnreadableInput.
    """

    tensors: Sequence[NativeInput]
    columns: int
    has_base: bool
    first_row: int
    row_length: int
    read_buffer: Bytes

    @property
    def input_count(self) -> int:
        return len(self.tensors) - self.has_base

    def reduce(
        self, reduction: Reduction, start: int, stop: int, dtype: str, out: Bytes, changes: Doubles, measured_rows: int
    ) -> float:
        """Write the reduction of the rows, plus the base if there is one, to `out`, rounded to `dtype`.

        Returns the largest magnitude before rounding, or NaN. Adds the effect of the first `measured_rows` on the base
        to `changes`: (sum of the base's squares, sum of the changes' squares, the largest change (a maximum, not a
        sum), elements that change, those of them whose change is lost to rounding).
        """
        arguments = (dtype, out, changes, measured_rows * self.columns)
        magnitude: float = self._reduce("reduce", reduction, start, stop, *arguments)
        return magnitude

    def l1_norms(self, reduction: Reduction, start: int, stop: int) -> Doubles:
        """The L1 norm of each input, and of what is kept of it: (inputs, 2). Remembers what is kept by rank."""
        import numpy as np

        norms = np.zeros((self.input_count, 2))
        self._reduce("l1_norms", reduction, start, stop, norms)
        return norms

    def kept_squares(self, reduction: Reduction, start: int, stop: int) -> Doubles:
        """The sum of the squares of what is kept of each input."""
        import numpy as np

        squares = np.zeros(self.input_count)
        self._reduce("kept_squares", reduction, start, stop, squares)
        return squares

    def load_rows(self, index: int, start: int, stop: int) -> Floats:
        """Rows of input `index`, minus the base if there is one, as float32."""
        import numpy as np

        out = np.empty(self._length(start, stop), np.float32)
        chosen = [index, len(self.tensors) - 1] if self.has_base else [index]
        self._call("load_values", self._from_row(start, chosen), self.has_base, len(out), out, of=chosen)
        return out

    def variances(self, start: int, stop: int) -> Floats:
        """The variance over the inputs of each element."""
        import numpy as np

        out = np.empty(self._length(start, stop), np.float32)
        self._call("variances", self._from_row(start), self.has_base, len(out), out)
        return out

    def inner_products(self, start: int, stop: int) -> Doubles:
        """The inner products of each input with itself and the inputs that follow it."""
        import numpy as np

        sums = np.zeros(self.input_count * (self.input_count + 1) // 2)
        self._call("inner_products", self._from_row(start), self.has_base, self._length(start, stop), sums)
        return sums

    def count_magnitudes(self, searches: Sequence[tuple[int, KthLargestSearch]], start: int, stop: int) -> None:
        """Add the magnitudes of the rows to each (input, search), in the inputs' order."""
        import numpy as np

        done, length = 0, self._length(start, stop)
        while done < length:
            for _, search in searches:
                search.make_room(CHUNK)
            counts = np.array([search.counts for _, search in searches])
            intervals = [
                (number, search.low, search.high, search.guess, search.candidates) for number, search in searches
            ]
            inputs = self._from_row(start, skipped=done)
            done += self._call("count_magnitudes", inputs, self.has_base, length - done, intervals, counts)
            for (_, search), row in zip(searches, counts, strict=True):
                assert search.counts is not None
                search.counts[:] = row

    def _reduce(self, name: str, reduction: Reduction, start: int, stop: int, *arguments: Any) -> Any:
        element, length = start * self.columns, self._length(start, stop)
        inputs = self._from_row(start)
        fields = self._arguments(reduction, is_last=name == "reduce")
        return self._call(name, inputs, self.has_base, fields, element, length, *arguments)

    def _call(self, name: str, *arguments: Any, of: Sequence[int] | None = None) -> Any:
        """Call a kernel on the rows of all tensors, or `of` some of them."""
        library = kernels()
        try:
            return getattr(library, name)(*arguments, self.read_buffer)
        except library.ReadError as error:
            raise UnreadableInput(error.args[0] if of is None else of[error.args[0]]) from None

    def _arguments(self, reduction: Reduction, is_last: bool) -> tuple[Any, ...]:
        """The reduction as module.c takes it; `is_last`: what is kept by rank is known already."""
        import numpy as np

        keep, combine = reduction.keep, reduction.combine
        kept = keep.native_table
        if isinstance(keep, KeepRanks):
            bits = keep.native_bits[0] if keep.native_bits else None
            kept = (kept, bits, 0 if bits is None else bits.shape[1], is_last)
        weights = reduction.weights or [0.0] * self.input_count
        divisor, scale, t, min_divisor = reduction.divisor("F32"), reduction.scale, reduction.t, reduction.min_divisor
        return (
            *(int(combine), keep.native_kind, reduction.fused, reduction.normalize),
            *(divisor, scale, t, min_divisor, self.row_length),
            *(np.array(reduction.factors, np.float32), np.array(weights, np.float32), kept),
        )

    def _length(self, start: int, stop: int) -> int:
        return (stop - start) * self.columns

    def _from_row(
        self, start: int, chosen: Sequence[int] | None = None, *, skipped: int = 0
    ) -> list[tuple[Bytes | int, int, str]]:
        """The tensors from row `start` on, without its first `skipped` elements."""
        first = (start - self.first_row) * self.columns + skipped
        tensors = self.tensors if chosen is None else [self.tensors[index] for index in chosen]
        return [(one.source, one.offset + first * ITEMSIZES[one.dtype], one.dtype) for one in tensors]


def read_buffer_nbytes(count: int, row_length: int = 0) -> int:
    """The size of the read buffer for `count` tensors in files; `row_length`: if rows are read whole."""
    return max(READ_NBYTES, count * max(CHUNK, row_length) * MAX_ITEMSIZE)


def ranking_nbytes(row_length: int, input_count: int) -> int:
    """Bytes that ranking takes: buffers for a row, marks for what is read at a time, and the bits of many rows."""
    return 48 * max(row_length, 128) + input_count * (max(READ_NBYTES, row_length) + MAX_RANK_BITS_NBYTES)


def rank_bits(input_count: int, numel: int, row_length: int) -> Bytes:
    """Room for a bit for each element of the first rows: (inputs, rows, bytes of a row)."""
    import numpy as np

    row_nbytes = -(-row_length // 8)
    rows = min(-(-numel // row_length), MAX_RANK_BITS_NBYTES // row_nbytes)
    return np.empty((input_count, rows, row_nbytes), np.uint8)
