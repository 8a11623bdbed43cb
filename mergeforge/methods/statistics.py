"""Statistics: the facts about a whole tensor that a method may request before it merges the first block.

    products = tensor.collect(InnerProducts())

A request is a frozen value; its type says what comes back. Two interpreters answer it: block_statistics.py in torch,
and tensors/native_statistics.py in C. Both see the tensor's inputs as the method does: models, or task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mergeforge.methods.block import Block
from mergeforge.methods.kth_largest import KthLargestSearch, Threshold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeforge.methods.keep import Keep

    Matrix = NDArray[np.float64]

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Request(Generic[R_co]):
    """A fact about a whole tensor; `R_co` is the type of the answer."""


@dataclass(frozen=True)
class InnerProducts(Request["Matrix"]):
    """The inner products of all pairs of inputs (inputs x inputs), summed in float64; 0 x 0 for an empty tensor."""


@dataclass(frozen=True)
class KthMagnitudes(Request[list[Threshold]]):
    """For each (input, k) the threshold that k of the input's magnitudes reach; k = 0: infinity.

    NaN counts as larger than infinity. Raises ArithmeticError where the threshold itself is NaN.
    """

    counts: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class KthVariance(Request[Threshold]):
    """The threshold that a fraction of the nonzero variances over the inputs reaches."""

    fraction: float


@dataclass(frozen=True)
class L1Norms(Request[list[tuple[float, float]]]):
    """The L1 norm of each input, and of what is kept of it, summed in float64."""

    keep: Keep


@dataclass(frozen=True)
class KeptSquares(Request[list[float]]):
    """The sum of the squares of what is kept of each input, in float64."""

    keep: Keep


@dataclass(frozen=True)
class EveryBlock(Request[list[Any]]):
    """What `visit` returns for every block, or for about `sample` of them; always computed in torch."""

    visit: Callable[[list[Tensor], Block], Any]
    sample: int = 0


class Statistics(Protocol):
    """One tensor: its number of elements and inputs, the dtype of the computation ("F32" or "F64"), its first block."""

    @property
    def numel(self) -> int: ...

    @property
    def input_count(self) -> int: ...

    @property
    def compute(self) -> str: ...

    @property
    def first_block(self) -> Block: ...

    def collect(self, request: Request[R]) -> R:
        """Answer a request, in one pass over the tensor or a few."""

    def count(self, values: Tensor, searches: Sequence[KthLargestSearch]) -> None:
        """Add the magnitudes of values that a method computed itself to searches."""


def norms(products: Matrix) -> Matrix:
    """The inputs' norms, from their inner products."""
    import numpy as np

    return np.sqrt(np.maximum(products.diagonal(), 0))
