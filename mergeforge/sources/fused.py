"""Kernels that read the stored inputs of a merge straight from their bytes.

torch makes one pass over memory for every operation, so that an average of three models moves ten times the bytes
of its inputs. Here one loop takes a few thousand elements, which stay in the first cache, through everything:
widened to float32, less the base, weighted, added up. The numbers are torch's, bit for bit; inner products are
added up in float64 on both sides.

A `Stack` is only made on a CPU where numba is (the extra `fast`), from tensors that lie in files as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.compiled import float_of, floats_at, fma, halves_at, kernel, reordering_kernel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeforge.methods.consensus import WeightedSum

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Integers = NDArray[np.int64]

BF16, F16, F32 = 0, 1, 2
KINDS = {"BF16": BF16, "F16": F16, "F32": F32}  # what kernels read
CHUNK = 2048  # elements at a time: a few buffers of 8 KiB


@dataclass(frozen=True)
class Stack:
    """The same rows of several tensors, as they are stored; the base, if inputs are taken less it, is the last.

    `places`: where each tensor's row `first` lies, as long as the tensors are held; `widths`: bytes of a row.
    """

    tensors: tuple[Tensor, ...]
    places: Integers
    widths: Integers
    kinds: Integers
    based: bool
    first: int

    def weighted(self, terms: WeightedSum, start: int, stop: int, out: Tensor) -> Tensor:
        """`terms` of rows [start, stop), plus the base if there is one, into `out` (float32)."""
        import numpy as np

        factors = np.array(terms.factors, np.float32)
        divisor: Any = np.float32(terms.divisor(out.dtype))
        scale: Any = np.float32(terms.scale)
        flat = out.numpy().reshape(-1)
        add_up(self._places(start), self.kinds, self.based, factors, terms.fused, divisor, scale, flat)
        return out

    def rows(self, at: int, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows [start, stop) of input `at`, less the base if there is one, into `out` (float32)."""
        places, last = self._places(start), len(self.tensors) - 1
        based = self.based and at != last
        difference(places[at], self.kinds[at], places[last], self.kinds[last], based, out.numpy().reshape(-1))
        return out

    def products(self, start: int, stop: int) -> Doubles:
        """The inner products of each input with itself and those that follow it, over rows [start, stop)."""
        import numpy as np

        inputs = len(self.tensors) - self.based
        sums = np.zeros(inputs * (inputs + 1) // 2)
        length = (stop - start) * self.tensors[0].shape[1]
        inner_products(self._places(start), self.kinds, self.based, length, sums)
        return sums

    def _places(self, start: int) -> Integers:
        """Where each tensor's row `start` lies."""
        return self.places + (start - self.first) * self.widths


def stack(tensors: Sequence[Tensor], dtypes: Sequence[str], *, based: bool, first: int) -> Stack:
    """Staged rows from row `first` on; `dtypes` are among KINDS."""
    import numpy as np

    places = np.array([one.data_ptr() for one in tensors], np.int64)
    widths = np.array([one.shape[1] * one.element_size() for one in tensors], np.int64)
    return Stack(tuple(tensors), places, widths, np.array([KINDS[dtype] for dtype in dtypes], np.int64), based, first)


@kernel
def widen(place: int, kind: int, start: int, into: Floats) -> None:
    """As many elements from `start` on as `into` holds, as float32."""
    count, bits = len(into), into.view(np.uint32)
    if kind == F32:
        single = floats_at(place + 4 * start, count)
        for i in range(count):
            into[i] = single[i]
        return
    half = halves_at(place + 2 * start, count)
    if kind == BF16:
        for i in range(count):
            bits[i] = np.uint32(half[i]) << np.uint32(16)
        return
    for i in range(count):
        bits[i] = np.uint32(half[i] & np.uint32(0x7FFF)) << np.uint32(13)
    for i in range(count):
        into[i] *= np.float32(2.0**112)  # float16's exponents begin there; subnormal numbers come out right, too
    for i in range(count):
        infinite = np.uint32(0x7F800000) if half[i] & np.uint32(0x7C00) == np.uint32(0x7C00) else np.uint32(0)
        bits[i] |= infinite | (half[i] & np.uint32(0x8000)) << np.uint32(16)


@kernel
def widen_less(place: int, kind: int, start: int, less: Floats, into: Floats) -> None:
    """The same less other numbers."""
    if kind == BF16:
        half = halves_at(place + 2 * start, len(into))
        for i in range(len(into)):
            into[i] = float_of(np.uint32(half[i]) << np.uint32(16)) - less[i]
        return
    widen(place, kind, start, into)
    for i in range(len(into)):
        into[i] -= less[i]


@kernel
def add_up(
    places: Integers,
    kinds: Integers,
    based: bool,
    factors: Floats,
    fused: bool,
    divisor: float,
    scale: float,
    out: Floats,
) -> None:
    """WeightedSum of the inputs (less the base, which is then added)."""
    last = len(factors)
    base, one = np.zeros(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, len(out), CHUNK):
        count = min(CHUNK, len(out) - start)
        total = out[start : start + count]
        total[:] = -0.0  # what changes no number that is added to it
        if based:
            widen(places[last], kinds[last], start, base[:count])
        for at in range(last):
            factor = factors[at]
            widen_less(places[at], kinds[at], start, base[:count], one[:count])
            if fused:
                for i in range(count):
                    total[i] = fma(one[i], factor, total[i])
            else:
                for i in range(count):
                    total[i] += one[i] * factor
        if divisor != 1:
            for i in range(count):
                total[i] /= divisor
        if scale != 1:
            for i in range(count):
                total[i] *= scale
        if based:
            for i in range(count):
                total[i] += base[i]


@kernel
def difference(place: int, kind: int, base_place: int, base_kind: int, based: bool, out: Floats) -> None:
    """One input, less the base if it is `based`."""
    if not based:
        widen(place, kind, 0, out)
        return
    base = np.empty(CHUNK, np.float32)
    for start in range(0, len(out), CHUNK):
        count = min(CHUNK, len(out) - start)
        widen(base_place, base_kind, start, base[:count])
        widen_less(place, kind, start, base[:count], out[start : start + count])


@reordering_kernel
def dot(one: Floats, two: Floats) -> float:
    total = 0.0
    for i in range(len(one)):
        total += np.float64(one[i]) * np.float64(two[i])
    return total


@kernel
def inner_products(places: Integers, kinds: Integers, based: bool, length: int, sums: Doubles) -> None:
    """Adds to `sums` the inner products of every pair of inputs (less the base), `length` elements each."""
    inputs = len(places) - (1 if based else 0)
    base, ones = np.zeros(CHUNK, np.float32), np.empty((inputs, CHUNK), np.float32)
    for start in range(0, length, CHUNK):
        count = min(CHUNK, length - start)
        if based:
            widen(places[inputs], kinds[inputs], start, base[:count])
        for at in range(inputs):
            widen_less(places[at], kinds[at], start, base[:count], ones[at, :count])
        pair = 0
        for at in range(inputs):
            for other in range(at, inputs):
                sums[pair] += dot(ones[at, :count], ones[other, :count])
                pair += 1
