"""Weighted sums of stored tensors that the C library computes from file to file, tile by tile.

The same bytes as through torch (execute/compute.py), with less: torch is not imported, which takes longer than many a
merge, and the inputs of a tile are not staged, since they never leave the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mergeforge.core.tensor_info import TensorInfo, Tile, sample_blocks
from mergeforge.errors import SourceError
from mergeforge.io.disk import DiskFile
from mergeforge.methods._random_mask import mask_key
from mergeforge.methods._thresholds import SAMPLE_BLOCKS, SAMPLE_ELEMENTS
from mergeforge.methods._weighted_sum import WeightedSum
from mergeforge.native import bindings
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.native_inputs import (
    MAX_ITEMSIZE,
    NATIVE_DTYPES,
    NativeInput,
    NativeInputs,
    UnreadableInput,
    read_buffer_nbytes,
)
from mergeforge.tensors.worker import Worker
from mergeforge.writers.encoder import TensorEncoder
from mergeforge.writers.safetensors import SafetensorsEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mergeforge.tensors.stored import StoredTensor

    Bytes = NDArray[np.uint8]
    Bits = NDArray[np.int32]
    Doubles = NDArray[np.float64]
    Integers = NDArray[np.int64]


T = TypeVar("T")
SPLIT_ELEMENTS = 1 << 16  # elements whose magnitudes are split at a time


def is_native(tensor: LazyTensor, info: TensorInfo, encoders: Sequence[TensorEncoder], device: str) -> bool:
    """Whether the C library can merge a tensor: a weighted sum of local files, written to safetensors only."""
    return (
        device == "cpu"
        and bindings.is_available()
        and isinstance(tensor, MergedTensor)
        and tensor.is_weighted_sum
        and all(isinstance(stored.file, DiskFile) for stored in tensor.stored_inputs)
        and [type(encoder) for encoder in encoders] == [SafetensorsEncoder]
        and info.dtype in NATIVE_DTYPES
    )


def native_staging_nbytes(tensor: LazyTensor, info: TensorInfo) -> int:
    """Bytes that a worker needs beside the written tile: the read buffer, and what collecting statistics keeps.

    Statistics need, besides the method's own bytes for each source, a block of one input, or two magnitude ranges of
    SPLIT_ELEMENTS of each.
    """
    assert isinstance(tensor, MergedTensor)  # is_native
    stats = tensor.method.native_stats_nbytes * len(tensor.sources)
    elements = max(info.block_rows * info.columns, 2 * len(tensor.sources) * max(SPLIT_ELEMENTS, info.columns))
    return read_buffer_nbytes(len(tensor.inputs)) + (stats + MAX_ITEMSIZE * elements if stats else 0)


@dataclass(frozen=True)
class NativeReduction:
    """One tensor's weighted sum in one worker. Raises SourceError for a file that cannot be read."""

    tensor: MergedTensor
    info: TensorInfo
    worker: Worker

    def collect_stats(self, tiles: Sequence[Tile]) -> WeightedSum:
        """The terms of the sum. A method that needs statistics of the whole tensor collects them over these tiles."""
        stats = self.tensor.method.collect_stats(_NativeScan(self, tiles), self.info.numel, self.tensor.parameters)
        return self.tensor.reduction(stats)

    def fill(
        self, terms: WeightedSum, tile: Tile, into: Bytes, sampled_rows: Sequence[range], changes: Doubles
    ) -> float:
        """Compute the tile's bytes `into` a buffer; returns the largest magnitude (or NaN) before rounding.

        The changes of `sampled_rows` (ranges within the tile, in order) are added to `changes` (NativeInputs).
        """
        bounds = sorted({tile.start, tile.stop, *(end for rows in sampled_rows for end in (rows.start, rows.stop))})
        sample_starts, magnitudes = {rows.start for rows in sampled_rows}, []
        with self.open_inputs(tile) as inputs:
            for start, stop in pairwise(bounds):
                out = into[(start - tile.start) * self.info.row_nbytes :]
                measured = changes if start in sample_starts else None
                magnitudes.append(inputs.weighted_sum(terms, start, stop, self.info.dtype, out, measured))
        for stored in self.tensor.stored_inputs:
            _file(stored).release(*_extent(stored, tile))
        return max(magnitudes, key=lambda magnitude: (math.isnan(magnitude), magnitude))

    @contextmanager
    def open_inputs(self, tile: Tile) -> Iterator[NativeInputs]:
        """The tile's rows of every input, for the C library to read."""
        stored_inputs, mark = self.tensor.stored_inputs, self.worker.mark()
        buffer = self.worker.allocate(read_buffer_nbytes(len(stored_inputs)))
        inputs = [
            NativeInput(stored.info.dtype, file=_file(stored).descriptor(), offset=_extent(stored, tile)[0])
            for stored in stored_inputs
        ]
        has_base = self.tensor.base is not None
        try:
            yield NativeInputs(inputs, self.info.columns, has_base=has_base, first_row=tile.start, read_buffer=buffer)
        except UnreadableInput as error:
            _raise_read_error(stored_inputs[error.index], tile)
        finally:
            self.worker.release(mark)


@dataclass(frozen=True)
class _NativeScan:
    """A pass over the tensor that offers what the C library can collect (methods.BlockScan)."""

    reduction: NativeReduction
    tiles: Sequence[Tile]

    def __call__(self, visit: object, sample: int = 0) -> Any:
        raise AssertionError(f"{self.reduction.tensor.method.name} needs blocks that only torch reads")  # a bug

    def inner_products(self) -> Iterator[Doubles]:
        return self._each_block(NativeInputs.inner_products)

    def l1_norms(self, density: Sequence[float] = (), ranges: Integers | None = None) -> Iterator[list[list[float]]]:
        tensor = self.reduction.tensor
        keys = [mask_key(tensor.block(0), number, kept) for number, kept in enumerate(density)]
        terms = WeightedSum([0.0] * len(tensor.sources), mask_keys=keys, magnitude_ranges=ranges)
        return self._each_block(lambda inputs, start, stop: inputs.l1_norms(terms, start, stop).tolist())

    def magnitude_samples(self, inputs: Sequence[int]) -> list[Bits]:
        import numpy as np

        info, samples = self.reduction.info, []
        for start, stop in sample_blocks(info, SAMPLE_BLOCKS):
            tile = Tile(info.name, start, stop)
            rows = np.empty(tile.rows * info.columns, np.float32)
            step = -(-len(rows) // SAMPLE_ELEMENTS) | 1
            with self.reduction.open_inputs(tile) as opened:
                loaded = (opened.load_rows(self._input(number), start, stop, rows) for number in inputs)
                samples.append([np.abs(values[::step]).view(np.int32) for values in loaded])
        return [np.concatenate(parts) for parts in zip(*samples, strict=True)]

    def split_magnitudes(self, ranges: Mapping[int, tuple[int, int]]) -> Iterator[dict[int, tuple[int, Bits]]]:
        numbers = sorted(ranges, key=self._input)
        input_ranges = [(self._input(number), *ranges[number]) for number in numbers]
        step = max(1, SPLIT_ELEMENTS // self.reduction.info.columns)

        def split(inputs: NativeInputs, start: int, stop: int) -> dict[int, tuple[int, Bits]]:
            return dict(zip(numbers, inputs.split_magnitudes(input_ranges, start, stop), strict=True))

        return self._each_block(split, step)

    def _input(self, number: int) -> int:
        return number % len(self.reduction.tensor.sources)

    def _each_block(self, visit: Callable[[NativeInputs, int, int], T], rows: int | None = None) -> Iterator[T]:
        """What `visit` returns for every block, or for every so many rows."""
        rows = rows or self.reduction.info.block_rows
        for tile in self.tiles:
            with self.reduction.open_inputs(tile) as inputs:
                for start in range(tile.start, tile.stop, rows):
                    yield visit(inputs, start, min(start + rows, tile.stop))


def _extent(stored: StoredTensor, tile: Tile) -> tuple[int, int]:
    """Offset and size in bytes of the tile's rows in the tensor's file."""
    return stored.offset + tile.start * stored.info.row_nbytes, tile.rows * stored.info.row_nbytes


def _file(stored: StoredTensor) -> DiskFile:
    assert isinstance(stored.file, DiskFile)  # is_native
    return stored.file


def _raise_read_error(stored: StoredTensor, tile: Tile) -> NoReturn:
    """Read again what the C library could not read, to raise the error that says why. Raises SourceError."""
    offset, nbytes = _extent(stored, tile)
    stored.file.read_into(memoryview(bytearray(nbytes)), offset)
    raise SourceError(f"{stored.file.path}: a read failed, then succeeded on retry", hint="run again")
