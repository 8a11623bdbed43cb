"""MergedTensor: several tensors combined by a merge method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.methods import Block, Method
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.native_inputs import NATIVE_DTYPES, NativeInput, NativeInputs
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeforge.methods._weighted_sum import WeightedSum

    _BlockInputs = tuple[list[Tensor], Tensor | None]  # a block as the method takes it; the base if it was subtracted

T = TypeVar("T")
MAX_NATIVE_ELEMENTS = 1 << 31  # random masks have one pair of keys per tensor up to this size (methods/_random_mask.py)


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
        return self.method.stats is not None

    @property
    def memory_cost(self) -> MemoryCost:
        cost = sum(
            (part.memory_cost for part in self.inputs), MemoryCost(scratch_blocks=self.method.scratch_blocks + 1)
        )
        alignment = ALIGNMENT * len(self.inputs)
        return cost + MemoryCost(fixed_nbytes=self.method.stats_nbytes * len(self.sources) + alignment)

    def collect_stats(self, scan: StatsPass) -> Any:
        block_scan = _NativeBlockScan if self._reads_natively(scan.worker, scan.dtype) else _BlockScan
        return self.method.collect_stats(block_scan(self, scan), self.info.numel, self.parameters)

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        own_stats = stats.get(id(self))
        if self.is_weighted_sum and self._reads_natively(worker, dtype):
            return self._native_sum_rows(self.reduction(own_stats), rows, worker, dtype)
        inputs, base = self.load_inputs(rows, worker, stats, dtype)

        def block(start: int, stop: int) -> Tensor:
            values, subtracted = inputs(start, stop)
            merged = self.method(values, own_stats, self.block(start), self.parameters)
            if subtracted is not None:
                return merged.add_(subtracted)
            return merged.add_(base(start, stop)) if base else merged

        return block

    def load_inputs(
        self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype
    ) -> tuple[Callable[[int, int], _BlockInputs], Rows | None]:
        """Load the sources as the method takes them, and the base if it is subtracted from none of them."""
        if self._reads_natively(worker, dtype):
            return self._native_input_rows(rows, worker, dtype), None
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

    def native_inputs(self, rows: range, worker: Worker) -> NativeInputs:
        """The rows of the sources and the base as they are stored, for the C library."""
        tensors = [NativeInput(part.info.dtype, part.read_bytes(rows, worker)) for part in self.stored_inputs]
        return NativeInputs(tensors, self.info.columns, has_base=self.base is not None, first_row=rows.start)

    def reduction(self, stats: Any, compute: str = "F32") -> WeightedSum:
        """What the method does with its inputs, if that is a weighted sum (is_weighted_sum)."""
        return self.method.weighted_sum(stats, len(self.sources), self.block(0), compute, self.parameters)

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
            isinstance(part, StoredTensor) and part.info.dtype in NATIVE_DTYPES and part.info.shape == shape
            for part in self.inputs
        )

    @property
    def is_weighted_sum(self) -> bool:
        """Whether the C library can compute the whole merge of this tensor."""
        return self.inputs_are_stored and self.method.is_sum(self.parameters) and self.info.numel <= MAX_NATIVE_ELEMENTS

    def block(self, start: int) -> Block:
        """The position of the block that starts at row `start`."""
        return Block(self.info.name, start * self.info.columns, self.seed, len(self.info.shape) < 2)

    def _reads_natively(self, worker: Worker, dtype: torch.dtype) -> bool:
        import torch

        return worker.uses_native and dtype == torch.float32 and self.inputs_are_stored

    def _native_sum_rows(self, reduction: WeightedSum, rows: range, worker: Worker, dtype: torch.dtype) -> Rows:
        stored, slot = self.native_inputs(rows, worker), worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            stored.weighted_sum(reduction, start, stop, "F32", out)
            return out

        return block

    def _native_input_rows(self, rows: range, worker: Worker, dtype: torch.dtype) -> Callable[[int, int], _BlockInputs]:
        stored = self.native_inputs(rows, worker)
        slots = [worker.next_slot() for _ in self.inputs]

        def inputs(start: int, stop: int) -> _BlockInputs:
            shape = (stop - start, self.info.columns)
            values = [
                stored.load_rows(index, start, stop, worker.scratch(slot, shape, dtype))
                for index, slot in enumerate(slots)
            ]
            return values[: len(self.sources)], values[-1] if self.base else None

        return inputs


class _BlockScan:
    """methods.BlockScan over a merged tensor: its inputs, block by block."""

    def __init__(self, tensor: MergedTensor, scan: StatsPass) -> None:
        self.tensor = tensor
        self.scan = scan

    def __call__(self, visit: Callable[[list[Tensor], Block], T], sample: int = 0) -> Iterator[T]:
        scan, tensor = self.scan, self.tensor
        load = partial(tensor.load_inputs, worker=scan.worker, stats=scan.stats, dtype=scan.dtype)
        for (inputs, _), start, stop in scan(load, sample):
            yield visit(inputs(start, stop)[0], tensor.block(start))


class _NativeBlockScan(_BlockScan):
    """Adds inner products that the C library computes directly from the inputs' bytes."""

    def inner_products(self) -> Iterator[NDArray[np.float64]]:
        for stored, start, stop in self.scan(partial(self.tensor.native_inputs, worker=self.scan.worker)):
            yield stored.inner_products(start, stop)
