"""Kernels that read the stored inputs of a merge straight from their bytes (kernels.c).

torch makes one pass over memory for every operation, so that an average of three models moves ten times the bytes
of its inputs. Here one loop takes a few thousand elements, which stay in the first cache, through everything:
widened to float32, less the base, weighted, added up. The numbers are torch's, bit for bit; inner products are
added up in float64 on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.native import PRODUCT_CHUNK, kernels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeforge.methods.consensus import WeightedSum

    Integers = NDArray[np.int64]

KINDS = {"BF16": 0, "F16": 1, "F32": 2}  # what kernels read, and its number in kernels.c


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

    @property
    def inputs(self) -> int:
        return len(self.tensors) - self.based

    def weighted(self, terms: WeightedSum) -> Callable[[int, Tensor], Tensor]:
        """What puts `terms` of the rows from one on, plus the base if there is one, into a tensor (float32)."""
        import numpy as np
        import torch

        factors, divisor = np.array(terms.factors, np.float32), terms.divisor(torch.float32)

        def fill(start: int, out: Tensor) -> Tensor:
            if len(factors) != self.inputs:
                raise AssertionError(f"{len(factors)} factors for {self.inputs} inputs")  # C would read beyond: a bug
            amount = (terms.fused, divisor, terms.scale, out.numel())
            kernels().weighted_sum(self._places(start), self.kinds, self.inputs, self.based, factors, *amount, out)
            return out

        return fill

    def rows(self, at: int, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows [start, stop) of input `at`, less the base if there is one, or of the base, into `out` (float32)."""
        pair = [at, len(self.tensors) - 1]
        based = self.based and at < self.inputs
        kernels().difference(self._places(start)[pair], self.kinds[pair], based, out.numel(), out)
        return out

    def products(self, start: int, stop: int) -> NDArray[np.float64]:
        """The inner products of each input with itself and those that follow it, over rows [start, stop)."""
        import numpy as np

        room, sums = np.empty(self.inputs * PRODUCT_CHUNK), np.zeros(self.inputs * (self.inputs + 1) // 2)
        length = (stop - start) * self.tensors[0].shape[1]
        kernels().inner_products(self._places(start), self.kinds, self.inputs, self.based, length, room, sums)
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
