"""Weighted sums of tensors that lie in files: read, added up and rounded by kernels in C, tile by tile.

A pass of its own beside the one through torch (computing.py), with the same bytes: it needs neither torch, whose
import takes longer than many a merge, nor a place for the inputs of a tile, which never leave the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mergeforge import native
from mergeforge.budget import Worker
from mergeforge.disk import DiskFile
from mergeforge.errors import SourceError
from mergeforge.methods.random_mask import drawing
from mergeforge.sinks import Outlet
from mergeforge.sinks.checkpoint import CheckpointOutlet
from mergeforge.sources import Way
from mergeforge.sources.fused import KINDS, Place, Stack, Unreadable, room_nbytes
from mergeforge.sources.merged import Merged
from mergeforge.tensors import TensorInfo, Tile, blocks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mergeforge.methods.consensus import WeightedSum
    from mergeforge.sources.stored import Stored

    Bytes = NDArray[np.uint8]
    Doubles = NDArray[np.float64]


T = TypeVar("T")


def is_summed(way: Way, info: TensorInfo, outlets: Sequence[Outlet], device: str) -> bool:
    """Whether a tensor is such a sum, and goes to a checkpoint alone."""
    return (
        device == "cpu"
        and native.available()
        and isinstance(way, Merged)
        and way.is_sum
        and all(isinstance(part.file, DiskFile) for part in way.stored_parts)
        and [type(outlet) for outlet in outlets] == [CheckpointOutlet]
        and info.dtype in KINDS
    )


def summing_nbytes(way: Way) -> int:
    """Memory that a worker needs beside the written tile."""
    return room_nbytes(len(way.parts))


@dataclass(frozen=True)
class Summing:
    """A tensor's sum in one worker's hands. Raises SourceError for a file that cannot be read."""

    way: Merged
    info: TensorInfo
    worker: Worker

    def learn(self, tiles: Sequence[Tile]) -> WeightedSum:
        """The terms of the sum; a method that learns something about the tensor sees these tiles."""
        learnt = self.way.method.learn(_Look(self, tiles), self.info.numel, self.way.parameters)
        return self.way.terms(learnt)

    def fill(self, terms: WeightedSum, tile: Tile, into: Bytes) -> float:
        """Put the tile's bytes `into`; the largest magnitude (or NaN) before it was rounded."""
        with self.reading(tile) as stack:
            magnitude = stack.weighted(terms, tile.start, tile.stop, self.info.dtype, into)
        for part in self.way.stored_parts:
            _file(part).was_read(*_extent(part, tile))
        return magnitude

    def changes(self, terms: WeightedSum, start: int, stop: int) -> tuple[float, float, float, int, int]:
        """Stack.changes of these rows."""
        with self.reading(Tile(self.info.name, start, stop)) as stack:
            return stack.changes(terms, start, stop, self.info.dtype)

    @contextmanager
    def reading(self, tile: Tile) -> Iterator[Stack]:
        """The tile's rows, where they lie."""
        parts, mark = self.way.stored_parts, self.worker.mark()
        room = self.worker.take(room_nbytes(len(parts)))
        places = [
            Place(part.info.dtype, file=_file(part).descriptor(), offset=_extent(part, tile)[0]) for part in parts
        ]
        based = self.way.base is not None
        try:
            yield Stack(places, self.info.columns, based=based, first=tile.start, room=room)
        except Unreadable as error:
            _say_why(parts[error.at], tile)
        finally:
            self.worker.release(mark)


@dataclass(frozen=True)
class _Look:
    """What methods see of the tensor (methods.Look)."""

    summing: Summing
    tiles: Sequence[Tile]

    def __call__(self, see: object, sample: int = 0) -> Any:
        raise AssertionError(f"{self.summing.way.method.name} looks at more than kernels tell")  # a bug

    def products(self) -> Iterator[Doubles]:
        return self._each(Stack.products)

    def masses(self, density: Sequence[float]) -> Iterator[list[list[float]]]:
        block = self.summing.way.block(0)
        kept = [drawing(block, at, one) for at, one in enumerate(density)]
        return self._each(lambda stack, start, stop: stack.masses(kept, start, stop).tolist())

    def _each(self, see: Callable[[Stack, int, int], T]) -> Iterator[T]:
        for tile in self.tiles:
            with self.summing.reading(tile) as stack:
                for start, stop in blocks(tile, self.summing.info):
                    yield see(stack, start, stop)


def _extent(part: Stored, tile: Tile) -> tuple[int, int]:
    """The first byte of the tile's rows in the part's file, and how many they are."""
    return part.offset + tile.start * part.info.row_nbytes, tile.rows * part.info.row_nbytes


def _file(part: Stored) -> DiskFile:
    assert isinstance(part.file, DiskFile)  # is_summed
    return part.file


def _say_why(part: Stored, tile: Tile) -> NoReturn:
    """Read again what the kernels could not. Raises SourceError."""
    offset, nbytes = _extent(part, tile)
    part.file.read_into(memoryview(bytearray(nbytes)), offset)
    raise SourceError(f"{part.file.path} could not be read once, and could then", hint="run again")
