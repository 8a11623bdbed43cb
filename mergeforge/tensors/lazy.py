"""Where tensors come from.

A *way* says how one tensor comes about, and is all that the rest of the engine knows of it: stored
in a file, a stored tensor with adapters folded in, several ways through a merge method. Evaluating
one has three steps: `learn` facts about the whole tensor (most ways need none), `stage` a tile
(read its bytes into the worker's buffer), then compute it block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mergeforge.core.tensor_info import TensorInfo, sample_blocks
from mergeforge.tensors.budget import MemoryCost, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Rows = Callable[[int, int], "Tensor"]  # rows [start, stop) of a staged tile; may be overwritten
Stats = dict[int, Any]  # id of a way -> what it learnt


class LazyTensor(Protocol):
    """How one tensor comes about."""

    @property
    def info(self) -> TensorInfo:
        """Name, shape and stored dtype of what it yields."""

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        """The ways that this one is made of."""

    @property
    def memory_cost(self) -> MemoryCost:
        """The memory that staging and computing takes."""

    @property
    def needs_stats(self) -> bool:
        """Whether it must see the whole tensor first."""

    def collect_stats(self, scan: StatsPass) -> Any:
        """Facts about the whole tensor."""

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        """Read what the rows need; the result computes blocks of them in `dtype`."""


@dataclass
class StatsPass:
    """Runs over a whole tensor block by block: in one staged tile where it fits, else tile by tile."""

    info: TensorInfo
    tiles: list[range]
    worker: Worker
    facts: Stats
    dtype: torch.dtype

    def __call__(self, stage: Callable[[range], T], sample: int = 0) -> Iterator[tuple[T, int, int]]:
        """(staged tile, start, stop) of every block, or of about `sample` evenly spaced ones."""
        if sample:
            yield from self._sampled(stage, sample)
            return
        for rows in self.tiles:
            yield from self._blocks(stage, rows)

    def _sampled(self, stage: Callable[[range], T], sample: int) -> Iterator[tuple[T, int, int]]:
        chosen = sample_blocks(self.info, sample)
        if len(self.tiles) == 1:
            self.worker.reset_scratch()
            staged = stage(self.tiles[0])
            for start, stop in chosen:
                yield staged, start, stop
            return
        for start, stop in chosen:
            yield from self._blocks(stage, range(start, stop))

    def _blocks(self, stage: Callable[[range], T], rows: range) -> Iterator[tuple[T, int, int]]:
        if len(self.tiles) == 1:
            self.worker.reset_scratch()
        else:
            self.worker.clear()
        staged = stage(rows)
        for start in range(rows.start, rows.stop, self.info.block_rows):
            yield staged, start, min(start + self.info.block_rows, rows.stop)


def collect_stats(way: LazyTensor, scan: StatsPass) -> Stats:
    """Let every part of a way that needs facts learn them, inner parts first."""
    for part in way.inputs:
        collect_stats(part, scan)
    if way.needs_stats and id(way) not in scan.facts:
        scan.facts[id(way)] = way.collect_stats(scan)
    return scan.facts


def any_needs_stats(way: LazyTensor) -> bool:
    return way.needs_stats or any(any_needs_stats(part) for part in way.inputs)
