"""Stored inputs of a merge as the C library reads them: straight from their bytes, in memory or in files.

torch makes one pass over memory per operation, so an average of three models moves ten times the bytes of its inputs.
The C library takes a few thousand elements, which stay in the L1 cache, through all steps at once: widen to float32,
subtract the base, weight, add, round. The results equal torch's bit for bit; inner products are summed in float64 in
both. Tensors in files are read in steps that stay in the L2 cache.
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
NATIVE_DTYPES = {"BF16": 0, "F16": 1, "F32": 2}  # dtypes that kernels.c reads and writes, and their numbers there
MAX_ITEMSIZE = 4  # bytes of an element
READ_NBYTES = 1 << 20  # bytes of all inputs together that are read at a time
IN_MEMORY = -1  # in place of a file descriptor
# struct magnitude_count of kernels.c
MAGNITUDE_COUNT = [("input", "i8"), ("low", "i4"), ("high", "i4"), ("inside", "i8"), ("count", "i8"), ("above", "i8")]


class UnreadableInput(Exception):
    """Input number `index` could not be read from its file."""

    def __init__(self, index: int) -> None:
        super().__init__(f"input {index} cannot be read")
        self.index = index


@dataclass(frozen=True)
class NativeInput:
    """Consecutive rows of a tensor: bytes in memory, or of a file from `offset` on."""

    dtype: str
    data: Bytes | None = None
    file: int = IN_MEMORY
    offset: int = 0

    @property
    def as_struct(self) -> tuple[int, int, int]:
        """The fields of struct input in kernels.c."""
        start = self.offset if self.data is None else self.data.ctypes.data
        return self.file, start, NATIVE_DTYPES[self.dtype]


class NativeInputs:
    """The same rows of several stored tensors; if there is a base to subtract, it is the last one.

    `first_row`: the number of the row that the tensors' bytes start with; `read_buffer`: read_buffer_nbytes() bytes,
    needed for tensors in files. Methods that take rows [start, stop) raise UnreadableInput.
    """

    def __init__(
        self,
        tensors: Sequence[NativeInput],
        columns: int,
        *,
        has_base: bool,
        first_row: int,
        read_buffer: Bytes | None = None,
    ) -> None:
        import numpy as np

        self.tensors = tensors  # keeps the bytes alive
        self.columns = columns
        self.has_base = has_base
        self.first_row = first_row
        self.input_count = len(tensors) - has_base
        self._structs = np.array([tensor.as_struct for tensor in tensors], np.int64)
        self._row_nbytes = np.array(
            [columns * (MAX_ITEMSIZE if tensor.dtype == "F32" else 2) for tensor in tensors], np.int64
        )
        self._read_buffer = np.empty(0, np.uint8) if read_buffer is None else read_buffer
        self._read_elems = len(self._read_buffer) // (len(tensors) * MAX_ITEMSIZE) // CHUNK * CHUNK
        self._input_ptrs = np.empty(len(tensors), np.int64)

    def weighted_sum(
        self, terms: WeightedSum, start: int, stop: int, dtype: str, out: Bytes | Tensor, changes: Doubles | None = None
    ) -> float:
        """Write the weighted sum of the rows, plus the base if there is one, to `out`, rounded to `dtype`.

        Returns the largest magnitude before rounding, or NaN. Adds the effect on the base to `changes`: (sum of the
        base's squares, sum of the changes' squares, the largest change (a maximum, not a sum), elements that change,
        those of them whose change is lost to rounding).
        """
        import numpy as np

        max_bits = ctypes.c_uint32()
        args, length = self._reduction_args(terms, start), self._length(start, stop)
        self._call("weighted_sum", start, stop, args, length, NATIVE_DTYPES[dtype], out, max_bits, changes)
        return float(np.uint32(max_bits.value).view(np.float32))

    def l1_norms(self, terms: WeightedSum, start: int, stop: int) -> Doubles:
        """The L1 norm of each input, and of the elements that the masks or ranges keep: (inputs, 2)."""
        import numpy as np

        norms = np.zeros((self.input_count, 2))
        self._call("l1_norms", start, stop, self._reduction_args(terms, start), self._length(start, stop), norms)
        return norms

    def load_rows(self, index: int, start: int, stop: int, out: F) -> F:
        """Write rows of input `index`, minus the base if there is one, or of the base itself, to `out` (float32)."""
        pair = [index, len(self.tensors) - 1]
        subtract = self.has_base and index < self.input_count
        self._call("difference", start, stop, subtract, self._length(start, stop), out, of=pair)
        return out

    def split_magnitudes(self, ranges: Sequence[tuple[int, int, int]], start: int, stop: int) -> list[tuple[int, Bits]]:
        """Split the inputs' magnitudes by their float32 bits.

        For each (input, low, high), in the order of the inputs: how many magnitudes have bits of at least `high`, and
        the bits of those in [low, high), minus `low`.
        """
        import numpy as np

        length = self._length(start, stop)
        inside = [np.empty(length, np.int32) for _ in ranges]
        rows = [(*limits, bits.ctypes.data, 0, 0) for limits, bits in zip(ranges, inside, strict=True)]
        table = np.array(rows, MAGNITUDE_COUNT)
        self._call("split_inputs", start, stop, self.input_count, self.has_base, length, table, len(table))
        counts = zip(table["above"].tolist(), table["count"].tolist(), inside, strict=True)
        return [(above, bits[:count]) for above, count, bits in counts]

    def inner_products(self, start: int, stop: int) -> Doubles:
        """The inner products of each input with itself and the inputs that follow it."""
        import numpy as np

        count = self.input_count
        buffer, sums = np.empty(count * PRODUCT_CHUNK), np.zeros(count * (count + 1) // 2)
        self._call("inner_products", start, stop, count, self.has_base, self._length(start, stop), buffer, sums)
        return sums

    def _call(self, name: str, start: int, stop: int, *arguments: Any, of: Sequence[int] | None = None) -> None:
        """Call a kernel on the rows of all tensors, or `of` some of them."""
        read_elems, inputs = self._read_elems or self._length(start, stop), self._structs_from(start)
        chosen = inputs if of is None else inputs[of]
        if failed := getattr(kernels(), name)(chosen, *arguments, read_elems, self._read_buffer, self._input_ptrs):
            raise UnreadableInput(failed - 1 if of is None else of[failed - 1])

    def _reduction_args(self, terms: WeightedSum, start: int) -> ReductionArgs:
        """The arguments of a reduction whose element 0 is the first of row `start`."""
        import numpy as np

        factors, weights = (np.array(values, np.float32) for values in (terms.factors, terms.election_weights))
        masks = np.array([[*key.upper, *key.lower, key.limit] for key in terms.mask_keys], np.uint32)
        ranges = np.empty((0, 6), np.int64) if terms.magnitude_ranges is None else terms.magnitude_ranges
        lengths = [len(array) for array in (factors, masks, ranges, weights)]
        if lengths[0] != self.input_count or not {*lengths[1:]} <= {0, self.input_count}:  # C would read out of bounds
            raise AssertionError(f"factors, masks, ranges, weights: {lengths} for {self.input_count} inputs")
        products = np.empty((len(weights), CHUNK), np.float32)
        product_ptrs = np.array([product.ctypes.data for product in products], np.int64)
        args = ReductionArgs(
            inputs=self.input_count,
            has_base=self.has_base,
            fused=terms.fused,
            element=start * self.columns,
            normalize=terms.normalize,
            divisor=terms.divisor("F32"),
            scale=terms.scale,
            is_nearswap=terms.nearswap_t is not None,
            nearswap_t=terms.nearswap_t or 0.0,
        )
        args.keep_alive(factors=factors, masks=masks, ranges=ranges, weights=weights, products=product_ptrs)
        args.chunks = products  # keeps alive what product_ptrs points to
        return args

    def _length(self, start: int, stop: int) -> int:
        return (stop - start) * self.columns

    def _structs_from(self, start: int) -> Integers:
        """struct input of each tensor, starting at row `start`."""
        structs = self._structs.copy()
        structs[:, 1] += (start - self.first_row) * self._row_nbytes
        return structs


def read_buffer_nbytes(count: int) -> int:
    """The size of the read buffer for `count` tensors in files."""
    return max(READ_NBYTES, count * CHUNK * MAX_ITEMSIZE)
