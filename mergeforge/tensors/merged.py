"""MergedTensor: several tensors combined by a merge method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mergeforge.core.tensor_info import TensorInfo, dtype_name, sample_blocks
from mergeforge.methods import Block, Method, Reduction, Statistics
from mergeforge.methods.block_statistics import SAMPLE_BLOCKS, BlockStatistics
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Span, Stats, StatsPass
from mergeforge.tensors.native_inputs import ITEMSIZES, NativeInput, NativeInputs, ranking_nbytes
from mergeforge.tensors.native_statistics import NativeStatistics, count_natively, sample_spans
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    _BlockInputs = tuple[list[Tensor], Tensor | None]  # a block as the method takes it; the base if it was subtracted
    _Inputs = Callable[[int, int], _BlockInputs]

T = TypeVar("T")
MAX_NATIVE_ELEMENTS = 1 << 31  # random masks have one pair of keys per tensor up to this size (methods/random_mask.py)


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """method(sources), plus the base if the sources are deltas.

    `subtract[i]` says that source i is a model from which the base must be subtracted first (an adapter's delta is
    one already); `base` is None for methods that work on the weights themselves.
    """

    info: TensorInfo
    method: Method
    sources: tuple[LazyTensor, ...]
    subtract: tuple[bool, ...]
    base: LazyTensor | None
    parameters: Mapping[str, Any]
    seed: int

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (*self.sources, self.base) if self.base else self.sources

    @property
    def needs_stats(self) -> bool:
        return self.method.needs_stats

    @property
    def memory_cost(self) -> MemoryCost:
        cost = sum(
            (part.memory_cost for part in self.inputs), MemoryCost(scratch_blocks=self.method.scratch_blocks + 1)
        )
        alignment = ALIGNMENT * len(self.inputs)
        ranking = ranking_nbytes(self.row_length, len(self.sources)) if self.method.ranks_rows else 0
        return cost + MemoryCost(fixed_nbytes=self.method.stats_nbytes * len(self.sources) + alignment + ranking)

    @property
    def has_native(self) -> bool:
        """Whether the C library can merge this tensor, however its inputs are computed."""
        return self.method.is_reduction(self.parameters) and self.info.numel <= MAX_NATIVE_ELEMENTS

    @property
    def row_length(self) -> int:
        """Elements of a row, in which magnitudes are ranked; those of a vector's block are one row."""
        return max(1, self.info.columns * (self.info.block_rows if len(self.info.shape) < 2 else 1))

    @property
    def stored_inputs(self) -> list[StoredTensor]:
        """The sources and the base, if `inputs_are_stored`."""
        return [part for part in self.inputs if isinstance(part, StoredTensor)]

    @property
    def inputs_are_stored(self) -> bool:
        """Whether the C library can read the inputs: all stored in files, and the base subtracted from all or none."""
        if not set(self.subtract) <= {self.base is not None}:
            return False
        shape = self.info.shape
        return all(
            isinstance(part, StoredTensor) and part.info.dtype in ITEMSIZES and part.info.shape == shape
            for part in self.inputs
        )

    def block(self, start: int) -> Block:
        """The position of the block that starts at row `start`."""
        return Block(self.info.name, start * self.info.columns, self.seed, len(self.info.shape) < 2)

    def collect_stats(self, scan: StatsPass) -> Any:
        natively = self._merges_natively(scan.worker)
        statistics: Statistics = self._native_statistics(scan) if natively else self._statistics(scan)
        return self.method.prepare(statistics, self.parameters)

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        prepared = stats[id(self)] if self.needs_stats else self._prepare(dtype_name(dtype))
        if isinstance(prepared, Reduction) and self._merges_natively(worker):
            return self._load_native(prepared, rows, worker, stats, dtype)
        inputs, base = self._load_inputs(rows, worker, stats, dtype)

        def merge(start: int, stop: int) -> Tensor:
            values, subtracted = inputs(start, stop)
            merged = self.method.merge_block(values, prepared, self.block(start), self.parameters)
            return self._on_base(merged, subtracted, base, start, stop)

        return merge

    def native_inputs(
        self, tensors: list[NativeInput], first_row: int, read_buffer: NDArray[np.uint8] | None = None
    ) -> NativeInputs:
        """The sources and the base as the C library reads them, from `first_row` on."""
        import numpy as np

        buffer = np.empty(0, np.uint8) if read_buffer is None else read_buffer
        has_base = len(tensors) > len(self.sources)
        return NativeInputs(tensors, self.info.columns, has_base, first_row, self.row_length, buffer)

    # in torch

    def _prepare(self, compute: str) -> Any:
        """What the method needs for a tensor of which it needs no statistics."""

        def scan(visit: object, sample: int = 0) -> Any:
            raise AssertionError(f"{self.method.name} does not declare that it needs statistics")  # a bug

        known = BlockStatistics(scan, self.info.numel, len(self.sources), self.block(0), compute)
        return self.method.prepare(known, self.parameters)

    def _statistics(self, scan: StatsPass) -> BlockStatistics:
        def blocks(visit: Callable[[list[Tensor], Block], T], sample: int = 0) -> Iterator[T]:
            load = partial(self._load_inputs, worker=scan.worker, stats=scan.stats, dtype=scan.dtype)
            spans = sample_blocks(self.info, sample) if sample else None
            for (inputs, _), start, stop in scan(load, spans):
                yield visit(inputs(start, stop)[0], self.block(start))

        compute = dtype_name(scan.dtype)
        counter = count_natively if scan.worker.counts_natively and compute == "F32" else None
        return BlockStatistics(blocks, self.info.numel, len(self.sources), self.block(0), compute, counter)

    def _load_inputs(
        self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype
    ) -> tuple[_Inputs, Rows | None]:
        """Load the sources as the method takes them, and the base if it is subtracted from none of them."""
        loaded = [source.load(rows, worker, stats, dtype) for source in self.sources]
        base = self.base.load(rows, worker, stats, dtype) if self.base else None

        def inputs(start: int, stop: int) -> _BlockInputs:
            values = [source_rows(start, stop) for source_rows in loaded]
            base_block = base(start, stop) if base and any(self.subtract) else None
            if base_block is not None:
                for value, subtract in zip(values, self.subtract, strict=True):
                    if subtract:
                        value.sub_(base_block)
            return values, base_block

        return inputs, base

    def _on_base(self, merged: Tensor, subtracted: Tensor | None, base: Rows | None, start: int, stop: int) -> Tensor:
        """Add the base back; `subtracted`: its block, if that was loaded."""
        if subtracted is not None:
            return merged.add_(subtracted)
        return merged.add_(base(start, stop)) if base else merged

    # in the C library

    def _merges_natively(self, worker: Worker) -> bool:
        return worker.merges_natively and self.has_native

    def _native_statistics(self, scan: StatsPass) -> NativeStatistics:
        def blocks(spans: list[Span] | None) -> Iterator[tuple[NativeInputs, int, int]]:
            if self.inputs_are_stored:
                yield from scan(partial(self._staged, worker=scan.worker), spans)
                return
            load = partial(self._load_inputs, worker=scan.worker, stats=scan.stats, dtype=scan.dtype)
            for (inputs, _), start, stop in scan(load, spans):
                yield self._in_memory(inputs(start, stop)[0], start), start, stop

        samples = sample_spans(self.info) if self.inputs_are_stored else sample_blocks(self.info, SAMPLE_BLOCKS)
        facts = self.info.numel, len(self.sources), self.block(0)
        return NativeStatistics(*facts, blocks, samples, self.row_length)

    def _load_native(self, reduction: Reduction, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        import numpy as np

        changes = np.zeros(5)
        if self.inputs_are_stored:
            staged, slot = self._staged(rows, worker), worker.next_slot()

            def merge_stored(start: int, stop: int) -> Tensor:
                out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
                staged.reduce(reduction, start, stop, "F32", _bytes_of(out), changes, 0)
                return out

            return merge_stored
        inputs, base = self._load_inputs(rows, worker, stats, dtype)

        def merge_loaded(start: int, stop: int) -> Tensor:
            values, subtracted = inputs(start, stop)
            merged = values[0]  # every element is read before it is overwritten
            loaded = self._in_memory(values, start)
            loaded.reduce(reduction, start, stop, "F32", _bytes_of(merged), changes, 0)
            return self._on_base(merged, subtracted, base, start, stop)

        return merge_loaded

    def _staged(self, rows: range, worker: Worker) -> NativeInputs:
        """The rows of the sources and the base as they are stored, in the worker's staging buffer."""
        stored = self.stored_inputs
        return self.native_inputs(
            [NativeInput(part.info.dtype, part.read_bytes(rows, worker)) for part in stored], rows.start
        )

    def _in_memory(self, values: list[Tensor], start: int) -> NativeInputs:
        """A block of every source as the method takes it."""
        return self.native_inputs([NativeInput("F32", _bytes_of(value)) for value in values], start)


def _bytes_of(values: Tensor) -> NDArray[np.uint8]:
    import torch

    return values.view(-1).view(torch.uint8).numpy()
