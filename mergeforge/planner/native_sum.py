"""Weighted sums of tensors that lie in files: read, added up and rounded by kernels in C, tile by tile.

A pass of its own beside the one through torch (computing.py), with the same bytes: it needs neither torch, whose
import takes longer than many a merge, nor a place for the inputs of a tile, which never leave the cache.
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
from mergeforge.methods._random_mask import drawing
from mergeforge.methods._thresholds import SAMPLE_BLOCKS, SAMPLE_ELEMENTS
from mergeforge.methods._weighted_sum import WeightedSum
from mergeforge.native import bindings
from mergeforge.tensors.budget import Worker
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.native_inputs import (
    KINDS,
    WIDEST,
    NativeInput,
    NativeInputs,
    UnreadableInput,
    read_buffer_nbytes,
)
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
PIECE = 1 << 16  # elements whose bits are split at a time


def is_native(way: LazyTensor, info: TensorInfo, outlets: Sequence[TensorEncoder], device: str) -> bool:
    """Whether a tensor is such a sum, and goes to a checkpoint alone."""
    return (
        device == "cpu"
        and bindings.available()
        and isinstance(way, MergedTensor)
        and way.is_sum
        and all(isinstance(part.file, DiskFile) for part in way.stored_parts)
        and [type(outlet) for outlet in outlets] == [SafetensorsEncoder]
        and info.dtype in KINDS
    )


def native_staging_nbytes(way: LazyTensor, info: TensorInfo) -> int:
    """Memory that a worker needs beside the written tile: the room for reading, and what a search in the tensor holds
    (with a block of one input, or two ranges of a piece of each)."""
    assert isinstance(way, MergedTensor)  # is_summed
    searching = way.method.sum_nbytes * len(way.sources)
    seen = max(info.block_rows * info.columns, 2 * len(way.sources) * max(PIECE, info.columns))
    return read_buffer_nbytes(len(way.inputs)) + (searching + WIDEST * seen if searching else 0)


@dataclass(frozen=True)
class NativeReduction:
    """A tensor's sum in one worker's hands. Raises SourceError for a file that cannot be read."""

    way: MergedTensor
    info: TensorInfo
    worker: Worker

    def collect_stats(self, tiles: Sequence[Tile]) -> WeightedSum:
        """The terms of the sum; a method that learns something about the tensor sees these tiles."""
        learnt = self.way.method.learn(_StatsReader(self, tiles), self.info.numel, self.way.parameters)
        return self.way.reduction(learnt)

    def fill(self, terms: WeightedSum, tile: Tile, into: Bytes, looked_at: Sequence[range], changes: Doubles) -> float:
        """Put the tile's bytes `into`; the largest magnitude (or NaN) before it was rounded.

        The changes (Stack.weighted) of the rows that are `looked_at`, in the tile's order, are added up.
        """
        ends = sorted({tile.start, tile.stop, *(end for rows in looked_at for end in (rows.start, rows.stop))})
        firsts, most = {rows.start for rows in looked_at}, []
        with self.reading(tile) as stack:
            for start, stop in pairwise(ends):
                out = into[(start - tile.start) * self.info.row_nbytes :]
                most.append(
                    stack.weighted(terms, start, stop, self.info.dtype, out, changes if start in firsts else None)
                )
        for part in self.way.stored_parts:
            _file(part).was_read(*_extent(part, tile))
        return max(most, key=lambda one: (math.isnan(one), one))

    @contextmanager
    def reading(self, tile: Tile) -> Iterator[NativeInputs]:
        """The tile's rows, where they lie."""
        parts, mark = self.way.stored_parts, self.worker.mark()
        room = self.worker.allocate(read_buffer_nbytes(len(parts)))
        places = [
            NativeInput(part.info.dtype, file=_file(part).descriptor(), offset=_extent(part, tile)[0]) for part in parts
        ]
        based = self.way.base is not None
        try:
            yield NativeInputs(places, self.info.columns, based=based, first=tile.start, room=room)
        except UnreadableInput as error:
            _say_why(parts[error.at], tile)
        finally:
            self.worker.release(mark)


@dataclass(frozen=True)
class _StatsReader:
    """What methods see of the tensor (methods.Look)."""

    summing: NativeReduction
    tiles: Sequence[Tile]

    def __call__(self, see: object, sample: int = 0) -> Any:
        raise AssertionError(f"{self.summing.way.method.name} looks at more than kernels tell")  # a bug

    def products(self) -> Iterator[Doubles]:
        return self._each(NativeInputs.products)

    def masses(self, density: Sequence[float] = (), bands: Integers | None = None) -> Iterator[list[list[float]]]:
        way = self.summing.way
        kept = [drawing(way.block(0), at, one) for at, one in enumerate(density)]
        terms = WeightedSum([0.0] * len(way.sources), kept=kept, bands=bands)
        return self._each(lambda stack, start, stop: stack.masses(terms, start, stop).tolist())

    def samples(self, inputs: Sequence[int]) -> list[Bits]:
        import numpy as np

        info, found = self.summing.info, []
        for start, stop in sample_blocks(info, SAMPLE_BLOCKS):
            tile = Tile(info.name, start, stop)
            room = np.empty(tile.rows * info.columns, np.float32)
            every = -(-len(room) // SAMPLE_ELEMENTS) | 1
            with self.summing.reading(tile) as stack:
                rows = (stack.rows(self._input(at), start, stop, room) for at in inputs)
                found.append([np.abs(one[::every]).view(np.int32) for one in rows])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def split(self, ranges: Mapping[int, tuple[int, int]]) -> Iterator[dict[int, tuple[int, Bits]]]:
        ordered = sorted(ranges, key=self._input)
        wanted = [(self._input(at), *ranges[at]) for at in ordered]
        step = max(1, PIECE // self.summing.info.columns)

        def see(stack: NativeInputs, start: int, stop: int) -> dict[int, tuple[int, Bits]]:
            return dict(zip(ordered, stack.split(wanted, start, stop), strict=True))

        return self._each(see, step)

    def _input(self, number: int) -> int:
        return number % len(self.summing.way.sources)

    def _each(self, see: Callable[[NativeInputs, int, int], T], step: int | None = None) -> Iterator[T]:
        """What is seen of every block, or of so many rows."""
        step = step or self.summing.info.block_rows
        for tile in self.tiles:
            with self.summing.reading(tile) as stack:
                for start in range(tile.start, tile.stop, step):
                    yield see(stack, start, min(start + step, tile.stop))


def _extent(part: StoredTensor, tile: Tile) -> tuple[int, int]:
    """The first byte of the tile's rows in the part's file, and how many they are."""
    return part.offset + tile.start * part.info.row_nbytes, tile.rows * part.info.row_nbytes


def _file(part: StoredTensor) -> DiskFile:
    assert isinstance(part.file, DiskFile)  # is_summed
    return part.file


def _say_why(part: StoredTensor, tile: Tile) -> NoReturn:
    """Read again what the kernels could not. Raises SourceError."""
    offset, nbytes = _extent(part, tile)
    part.file.read_into(memoryview(bytearray(nbytes)), offset)
    raise SourceError(f"{part.file.path} could not be read once, and could then", hint="run again")
