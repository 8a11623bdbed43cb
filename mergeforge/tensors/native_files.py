"""Merging stored tensors in the C library from file to file, tile by tile.

The same bytes as through torch (execute/compute.py), with less: torch is not imported, which takes longer than many a
merge, and the inputs of a tile are not staged, since they never leave the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from mergeforge.core.tensor_info import TensorInfo, Tile
from mergeforge.errors import SourceError
from mergeforge.io.disk import DiskFile
from mergeforge.methods import Reduction
from mergeforge.tensors.lazy import Span
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.native_inputs import (
    NativeInput,
    NativeInputs,
    UnreadableInput,
    ranking_nbytes,
    read_buffer_nbytes,
)
from mergeforge.tensors.native_statistics import NativeStatistics, sample_spans, sampling_nbytes
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mergeforge.tensors.stored import StoredTensor

    Bytes = NDArray[np.uint8]
    Doubles = NDArray[np.float64]


def staging_nbytes(tensor: MergedTensor) -> int:
    """Bytes that a worker needs beside the written tile: the read buffer, statistics, and the C library's own."""
    count = len(tensor.sources)
    searching = tensor.method.stats_nbytes * count + (
        sampling_nbytes(tensor.info, count) if tensor.method.stats_nbytes else 0
    )
    ranking = ranking_nbytes(tensor.row_length, count) if tensor.method.ranks_rows else 0
    return _read_buffer_nbytes(tensor) + searching + ranking


def _read_buffer_nbytes(tensor: MergedTensor) -> int:
    return read_buffer_nbytes(len(tensor.inputs), tensor.row_length if tensor.method.ranks_rows else 0)


@dataclass(frozen=True)
class NativeMerge:
    """The merge of one tensor in one worker. Raises SourceError for a file that cannot be read."""

    tensor: MergedTensor
    info: TensorInfo
    worker: Worker

    def prepare(self, tiles: Sequence[Tile]) -> Reduction:
        """The reduction. A method that needs statistics of the whole tensor collects them over these tiles."""
        tensor, opened = self.tensor, (0, 0)

        def scan(spans: list[Span] | None) -> Iterator[tuple[NativeInputs, int, int]]:
            nonlocal opened
            for start, stop in spans or [(tile.start, tile.stop) for tile in tiles]:
                opened = start, stop
                with self.open_inputs(start, stop) as inputs:
                    for first in range(start, stop, self.info.block_rows):
                        yield inputs, first, min(first + self.info.block_rows, stop)

        facts = self.info.numel, len(tensor.sources), tensor.block(0)
        statistics = NativeStatistics(*facts, scan, sample_spans(self.info), tensor.row_length)
        try:
            reduction = tensor.method.prepare(statistics, tensor.parameters)
        except UnreadableInput as error:
            _raise_read_error(tensor.stored_inputs[error.index], *opened)
        assert isinstance(reduction, Reduction)
        return reduction

    def fill(self, reduction: Reduction, tile: Tile, out: Bytes, measured: Sequence[range], changes: Doubles) -> float:
        """Write the tile's bytes to `out`; returns the largest magnitude (or NaN) before rounding.

        The changes of the `measured` rows (ranges within the tile, each at the start of a block, in order) are added to
        `changes` (NativeInputs).
        """
        rows_from = {rows.start: len(rows) for rows in measured}
        magnitudes = []
        with self.open_inputs(tile.start, tile.stop) as inputs:
            for start, stop in pairwise(sorted({tile.start, tile.stop, *rows_from})):
                part = out[(start - tile.start) * self.info.row_nbytes : (stop - tile.start) * self.info.row_nbytes]
                arguments = (reduction, start, stop, self.info.dtype, part, changes, rows_from.get(start, 0))
                try:
                    magnitudes.append(inputs.reduce(*arguments))
                except UnreadableInput as error:
                    _raise_read_error(self.tensor.stored_inputs[error.index], tile.start, tile.stop)
        for stored in self.tensor.stored_inputs:
            _file(stored).release(*_extent(stored, tile.start, tile.stop))
        return max(magnitudes, key=lambda magnitude: (math.isnan(magnitude), magnitude))

    @contextmanager
    def open_inputs(self, start: int, stop: int) -> Iterator[NativeInputs]:
        """The rows of every input, for the C library to read."""
        stored_inputs, mark = self.tensor.stored_inputs, self.worker.mark()
        buffer = self.worker.allocate(_read_buffer_nbytes(self.tensor))
        inputs = [
            NativeInput(stored.info.dtype, _file(stored).descriptor(), _extent(stored, start, stop)[0])
            for stored in stored_inputs
        ]
        try:
            yield self.tensor.native_inputs(inputs, start, buffer)
        finally:
            self.worker.release(mark)


def _extent(stored: StoredTensor, start: int, stop: int) -> tuple[int, int]:
    """Offset and size in bytes of the rows in the tensor's file."""
    return stored.offset + start * stored.info.row_nbytes, (stop - start) * stored.info.row_nbytes


def _file(stored: StoredTensor) -> DiskFile:
    assert isinstance(stored.file, DiskFile)  # planner/backend.py
    return stored.file


def _raise_read_error(stored: StoredTensor, start: int, stop: int) -> NoReturn:
    """Read again what the C library could not read, to raise the error that says why. Raises SourceError."""
    offset, nbytes = _extent(stored, start, stop)
    stored.file.read_into(memoryview(bytearray(nbytes)), offset)
    raise SourceError(f"{stored.file.path}: a read failed, then succeeded on retry", hint="run again")
