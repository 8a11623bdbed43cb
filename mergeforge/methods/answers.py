"""Answers to requests, from what is measured block by block; C and torch differ only in how they measure a block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mergeforge.methods.kth_largest import KthLargestSearch, Threshold
from mergeforge.methods.statistics import (
    InnerProducts,
    KeptSquares,
    KthMagnitudes,
    KthVariance,
    L1Norms,
    Request,
)
from mergeforge.methods.thresholds import VARIANCE, Searches, find_thresholds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mergeforge.methods.keep import Keep
    from mergeforge.methods.kth_largest import Bits

    Matrix = NDArray[np.float64]

R = TypeVar("R")


class MeasuredBlocks(Protocol):
    """What is measured of a tensor; each method goes over all of its blocks, and yields what it finds in each."""

    @property
    def numel(self) -> int: ...

    @property
    def input_count(self) -> int: ...

    def sample_magnitudes(self, numbers: list[int]) -> list[Bits]:
        """A sample of the magnitudes of each of these inputs, as bits."""

    def count_magnitudes(self, searches: Searches) -> None:
        """Add all magnitudes to the searches."""

    def inner_products(self) -> Iterator[Matrix]:
        """The inner products of each input with itself and the inputs after it, in one row."""

    def l1_norms(self, keep: Keep) -> Iterator[Sequence[tuple[float, float]]]:
        """The L1 norm of each input before and after dropping."""

    def kept_squares(self, keep: Keep) -> Iterator[Sequence[float]]:
        """The sum of the squares that are kept of each input."""


def answer(request: Request[Any], tensor: MeasuredBlocks) -> Any:
    """The answer to any request but EveryBlock. Raises TypeError for another request."""
    match request:
        case InnerProducts():
            return _symmetric(list(tensor.inner_products()))
        case KthMagnitudes(counts):
            return _thresholds(tensor, [(number, KthLargestSearch(k, tensor.numel)) for number, k in counts])
        case KthVariance(fraction):
            (threshold,) = _thresholds(tensor, [(VARIANCE, KthLargestSearch(0, tensor.numel, fraction))])
            return threshold
        case L1Norms(keep):
            by_input = _by_input(list(tensor.l1_norms(keep)), tensor.input_count)
            return [tuple(map(math.fsum, zip(*norms, strict=True))) if norms else (0.0, 0.0) for norms in by_input]
        case KeptSquares(keep):
            return [math.fsum(squares) for squares in _by_input(list(tensor.kept_squares(keep)), tensor.input_count)]
    raise TypeError(f"no answer to {request}")


def _thresholds(tensor: MeasuredBlocks, searches: Searches) -> list[Threshold]:
    return find_thresholds(searches, tensor.sample_magnitudes, tensor.count_magnitudes)


def _by_input(by_block: Sequence[Sequence[R]], input_count: int) -> list[list[R]]:
    """What was measured of each input in each block, by input."""
    return [[measured[number] for measured in by_block] for number in range(input_count)]


def _symmetric(block_sums: Sequence[Matrix]) -> Matrix:
    """The sum of the upper triangles of all blocks, as a symmetric matrix; 0 x 0 for no blocks."""
    import numpy as np

    count = (math.isqrt(8 * len(block_sums[0]) + 1) - 1) // 2 if block_sums else 0
    products = np.zeros((count, count))
    if block_sums:
        upper = np.triu_indices(count)
        products[upper] = products.T[upper] = np.sum(block_sums, axis=0)
    return products
