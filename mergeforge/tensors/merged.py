"""Several ways through a merge method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.methods import Block, Method
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor
from mergeforge.tensors.native_inputs import KINDS, NativeInput, NativeInputs
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeforge.methods._weighted_sum import WeightedSum

    _Inputs = tuple[list[Tensor], Tensor | None]  # of a block, as the method takes them; the base if it was taken away

T = TypeVar("T")
SAME_KEYS = 1 << 31  # elements, up to which a random mask of a tensor has the same keys (methods/random_mask.py)


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """method(inputs), plus the base where the inputs are deltas.

    `subtract[i]` says that input i is a model from which the base has to be taken first (an
    adapter's delta is one already); `base` is None for methods on the weights themselves.
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
        return self.method.facts is not None

    @property
    def memory_cost(self) -> MemoryCost:
        inside = sum((part.memory_cost for part in self.inputs), MemoryCost(scratch_blocks=self.method.live + 1))
        aligning = ALIGNMENT * len(self.inputs)
        return inside + MemoryCost(fixed_nbytes=self.method.facts_nbytes * len(self.sources) + aligning)

    def collect_stats(self, scan: StatsPass) -> Any:
        looks = _NativeStatsPass if self._is_stacked(scan.worker, scan.dtype) else _BlockStatsPass
        return self.method.learn(looks(self, scan), self.info.numel, self.parameters)

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        learnt = facts.get(id(self))
        if self.is_sum and self._is_stacked(worker, dtype):
            return self._native_sum_rows(self.reduction(learnt), rows, worker, dtype)
        inputs, base = self.staged(rows, worker, facts, dtype)

        def block(start: int, stop: int) -> Tensor:
            values, subtracted = inputs(start, stop)
            merged = self.method(values, learnt, self.block(start), self.parameters)
            if subtracted is not None:
                return merged.add_(subtracted)
            return merged.add_(base(start, stop)) if base else merged

        return block

    def staged(
        self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype
    ) -> tuple[Callable[[int, int], _Inputs], Rows | None]:
        """Rows of the inputs, as the method takes them, and of a base that was taken from none of them."""
        if self._is_stacked(worker, dtype):
            return self._native_input_rows(rows, worker, dtype), None
        staged = [way.load(rows, worker, facts, dtype) for way in self.sources]
        base = self.base.load(rows, worker, facts, dtype) if self.base else None

        def inputs(start: int, stop: int) -> _Inputs:
            values = [rows_of(start, stop) for rows_of in staged]
            minus = base(start, stop) if base and any(self.subtract) else None
            if minus is not None:
                for value, less in zip(values, self.subtract, strict=True):
                    if less:
                        value.sub_(minus)
            return values, minus

        return inputs, base

    def native_inputs(self, rows: range, worker: Worker) -> NativeInputs:
        """Rows of the inputs and the base as they are stored, for kernels."""
        places = [NativeInput(part.info.dtype, part.bytes(rows, worker)) for part in self.stored_parts]
        return NativeInputs(places, self.info.columns, based=self.base is not None, first=rows.start)

    def reduction(self, learnt: Any, compute: str = "F32") -> WeightedSum:
        """What the method makes of the inputs, where that is a weighted sum."""
        return self.method.weighted_sum(learnt, len(self.sources), self.block(0), compute, self.parameters)

    @property
    def stored_parts(self) -> list[StoredTensor]:
        """The inputs and the base, of a way that is_of_stored."""
        return [part for part in self.inputs if isinstance(part, StoredTensor)]

    @property
    def inputs_are_stored(self) -> bool:
        """Whether kernels read the inputs: tensors as they lie in files, all less the base or none."""
        if not set(self.subtract) <= {self.base is not None}:
            return False
        shape = self.info.shape
        return all(
            isinstance(one, StoredTensor) and one.info.dtype in KINDS and one.info.shape == shape for one in self.inputs
        )

    @property
    def is_sum(self) -> bool:
        """Whether kernels know all that the method does with them."""
        return self.inputs_are_stored and self.method.is_sum(self.parameters) and self.info.numel <= SAME_KEYS

    def block(self, start: int) -> Block:
        return Block(self.info.name, start * self.info.columns, self.seed, len(self.info.shape) < 2)

    def _is_stacked(self, worker: Worker, dtype: torch.dtype) -> bool:
        import torch

        return worker.kernels and dtype == torch.float32 and self.inputs_are_stored

    def _native_sum_rows(self, terms: WeightedSum, rows: range, worker: Worker, dtype: torch.dtype) -> Rows:
        stored, slot = self.native_inputs(rows, worker), worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            into = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            stored.weighted(terms, start, stop, "F32", into)
            return into

        return block

    def _native_input_rows(self, rows: range, worker: Worker, dtype: torch.dtype) -> Callable[[int, int], _Inputs]:
        stored = self.native_inputs(rows, worker)
        slots = [worker.next_slot() for _ in self.inputs]

        def inputs(start: int, stop: int) -> _Inputs:
            shape = (stop - start, self.info.columns)
            values = [stored.rows(at, start, stop, worker.scratch(slot, shape, dtype)) for at, slot in enumerate(slots)]
            return values[: len(self.sources)], values[-1] if self.base else None

        return inputs


class _BlockStatsPass:
    """What a method sees of a tensor: its inputs, block by block."""

    def __init__(self, way: MergedTensor, scan: StatsPass) -> None:
        self.way = way
        self.scan = scan

    def __call__(self, see: Callable[[list[Tensor], Block], T], sample: int = 0) -> Iterator[T]:
        scan, way = self.scan, self.way
        stage = partial(way.staged, worker=scan.worker, facts=scan.facts, dtype=scan.dtype)
        for (inputs, _), start, stop in scan(stage, sample):
            yield see(inputs(start, stop)[0], way.block(start))


class _NativeStatsPass(_BlockStatsPass):
    """With inner products that are added up straight from the inputs' bytes."""

    def products(self) -> Iterator[NDArray[np.float64]]:
        for stored, start, stop in self.scan(partial(self.way.native_inputs, worker=self.scan.worker)):
            yield stored.products(start, stop)
