"""LazyTensor: how one tensor is computed, before any of it is read.

The executor knows nothing else about a tensor: it may be stored in a file, a stored tensor with adapters folded in,
or several tensors combined by a merge method. Evaluation has three steps: `collect_stats` over the whole tensor (most
kinds need none), `load` a tile (read its bytes into the worker's staging buffer), then compute it block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Rows = Callable[[int, int], "Tensor"]  # computes rows [start, stop) of a loaded tile; the result may be overwritten
Span = tuple[int, int]  # rows [start, stop)
Stats = dict[int, Any]  # id of a LazyTensor -> the statistics it collected


class LazyTensor(Protocol):
    """How one tensor is computed from its inputs."""

    @property
    def info(self) -> TensorInfo:
        """Name, shape and dtype of the result."""

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        """The tensors that this one is computed from."""

    @property
    def memory_cost(self) -> MemoryCost:
        """The memory that loading and computing takes."""

    @property
    def needs_stats(self) -> bool:
        """Whether collect_stats() must see the whole tensor before a tile is loaded."""

    def collect_stats(self, scan: StatsPass) -> Any:
        """Compute facts about the whole tensor."""

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        """Read what the rows need; the returned function computes blocks of them in `dtype`."""


@dataclass
class StatsPass:
    """Iterates over the blocks of a whole tensor: loaded as one tile where it fits, otherwise tile by tile."""

    info: TensorInfo
    tiles: list[range]
    worker: Worker
    stats: Stats
    dtype: torch.dtype

    def __call__(self, load: Callable[[range], T], spans: list[Span] | None = None) -> Iterator[tuple[T, int, int]]:
        """Yield (loaded tile, start, stop) for every block, or for the given row ranges, each within a block."""
        if spans is None:
            for rows in self.tiles:
                yield from self._blocks(load, rows)
        elif len(self.tiles) == 1:
            self.worker.reset_scratch()
            loaded = load(self.tiles[0])
            for start, stop in spans:
                yield loaded, start, stop
        else:
            for start, stop in spans:
                yield from self._blocks(load, range(start, stop))

    def _blocks(self, load: Callable[[range], T], rows: range) -> Iterator[tuple[T, int, int]]:
        if len(self.tiles) == 1:
            self.worker.reset_scratch()
        else:
            self.worker.clear()
        loaded = load(rows)
        for start in range(rows.start, rows.stop, self.info.block_rows):
            yield loaded, start, min(start + self.info.block_rows, rows.stop)


def collect_stats(tensor: LazyTensor, scan: StatsPass) -> Stats:
    """Collect the statistics of a tensor and of everything it is computed from, inputs first."""
    for part in tensor.inputs:
        collect_stats(part, scan)
    if tensor.needs_stats and id(tensor) not in scan.stats:
        scan.stats[id(tensor)] = tensor.collect_stats(scan)
    return scan.stats


def any_needs_stats(tensor: LazyTensor) -> bool:
    """Whether the tensor or anything it is computed from needs statistics."""
    return tensor.needs_stats or any(any_needs_stats(part) for part in tensor.inputs)
