"""NativeStatistics: statistics of a tensor in the C library, from the bytes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.methods.answers import answer
from mergeforge.methods.block import Block
from mergeforge.methods.keep import Keep, KeepRanks
from mergeforge.methods.kth_largest import KthLargestSearch
from mergeforge.methods.reduction import Combine, Reduction
from mergeforge.methods.statistics import Request
from mergeforge.methods.thresholds import VARIANCE, Searches
from mergeforge.tensors.lazy import Span
from mergeforge.tensors.native_inputs import NativeInput, NativeInputs, rank_bits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeforge.methods.kth_largest import Bits

R = TypeVar("R")
SAMPLE_SPANS, SAMPLE_ELEMENTS = 32, 1 << 14  # a sample: how many places, and about how many elements of each
MAX_SAMPLES = 1 << 17  # of an input

# Inputs and a row range that they hold, for every block of the tensor or for the given row ranges.
NativeScan = Callable[[list[Span] | None], Iterator[tuple[NativeInputs, int, int]]]


@dataclass(frozen=True)
class NativeStatistics:
    """Answers requests by scanning a tensor in the C library (statistics.Statistics).

    `samples`: the row ranges from which magnitudes are sampled. `row_length`: elements of a row, for ranking.
    """

    numel: int
    input_count: int
    first_block: Block
    scan: NativeScan
    samples: list[Span]
    row_length: int
    compute: str = "F32"

    def collect(self, request: Request[R]) -> R:
        return cast(R, answer(request, self))

    def count(self, values: Tensor, searches: Sequence[KthLargestSearch]) -> None:
        count_natively(values, searches)

    def inner_products(self) -> Iterator[NDArray[np.float64]]:
        return (inputs.inner_products(start, stop) for inputs, start, stop in self.scan(None))

    def sample_magnitudes(self, numbers: list[int]) -> list[Bits]:
        import numpy as np

        step = -(-self.numel // MAX_SAMPLES) | 1 if len(self.samples) == 1 else 0
        by_span = [
            [_magnitude_bits(_values(inputs, number, start, stop), step) for number in numbers]
            for inputs, start, stop in self.scan(self.samples)
        ]
        return [np.concatenate(samples) for samples in zip(*by_span, strict=True)]

    def count_magnitudes(self, searches: Searches) -> None:
        for inputs, start, stop in self.scan(None):
            inputs.count_magnitudes(searches, start, stop)

    def l1_norms(self, keep: Keep) -> Iterator[list[tuple[float, float]]]:
        if isinstance(keep, KeepRanks):
            keep.native_bits[:] = [rank_bits(self.input_count, self.numel, self.row_length)]
        reduction = Reduction([0.0] * self.input_count, keep=keep)
        return (inputs.l1_norms(reduction, start, stop).tolist() for inputs, start, stop in self.scan(None))

    def kept_squares(self, keep: Keep) -> Iterator[list[float]]:
        reduction = Reduction([0.0] * self.input_count, Combine.CONSENSUS_MEAN, keep)
        return (inputs.kept_squares(reduction, start, stop).tolist() for inputs, start, stop in self.scan(None))


def count_natively(values: Tensor, searches: Sequence[KthLargestSearch]) -> None:
    """Add the magnitudes of float32 values on a CPU to searches."""
    import numpy as np
    import torch

    flat = values.float().reshape(1, -1)
    data = NativeInput("F32", flat.view(-1).view(torch.uint8).numpy())
    inputs = NativeInputs([data], flat.shape[1], False, 0, flat.shape[1], np.empty(0, np.uint8))
    inputs.count_magnitudes([(0, search) for search in searches], 0, 1)


def sample_spans(info: TensorInfo) -> list[Span]:
    """Evenly spaced row ranges of about SAMPLE_ELEMENTS, first and last rows included; all rows of a small tensor."""
    rows = max(1, SAMPLE_ELEMENTS // max(info.columns, 1))
    if info.rows <= rows * SAMPLE_SPANS:
        return [(0, info.rows)]
    starts = [index * (info.rows - rows) // (SAMPLE_SPANS - 1) for index in range(SAMPLE_SPANS)]
    return [(start, start + rows) for start in starts]


def sampling_nbytes(info: TensorInfo, input_count: int) -> int:
    """Bytes that sampling takes: the samples of every input, twice while they are joined, and rows that are loaded."""
    loaded = max((min(stop - start, info.block_rows) for start, stop in sample_spans(info)), default=0) * info.columns
    return 4 * (2 * min(MAX_SAMPLES, info.numel) * input_count + 2 * loaded)


def _values(inputs: NativeInputs, number: int, start: int, stop: int) -> NDArray[np.float32]:
    return inputs.variances(start, stop) if number == VARIANCE else inputs.load_rows(number, start, stop)


def _magnitude_bits(values: NDArray[np.float32], step: int) -> Bits:
    """The bits of every `step`-th magnitude, or of so many that there are MAX_SAMPLES / SAMPLE_SPANS.

    The step is odd, so that the samples of a matrix come from every column.
    """
    import numpy as np

    step = step or -(-len(values) * SAMPLE_SPANS // MAX_SAMPLES) | 1
    bits: Bits = np.abs(values[::step]).view(np.int32)
    return bits
