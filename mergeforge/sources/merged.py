"""Several ways through a merge method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mergeforge.budget import ALIGNMENT, Need, Worker
from mergeforge.methods import Block, Method
from mergeforge.sources import Facts, Rows, Scan, Way
from mergeforge.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    _Inputs = tuple[list[Tensor], Tensor | None]  # of a block, as the method takes them; the base if it was taken away

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Merged:
    """method(inputs), plus the base where the inputs are deltas.

    `subtract[i]` says that input i is a model from which the base has to be taken first (an
    adapter's delta is one already); `base` is None for methods on the weights themselves.
    """

    info: TensorInfo
    method: Method
    inputs: tuple[Way, ...]
    subtract: tuple[bool, ...]
    base: Way | None
    parameters: Mapping[str, Any]
    seed: int

    @property
    def parts(self) -> tuple[Way, ...]:
        return (*self.inputs, self.base) if self.base else self.inputs

    @property
    def learns(self) -> bool:
        return self.method.facts is not None

    @property
    def need(self) -> Need:
        inside = sum((part.need for part in self.parts), Need(live=self.method.live + 1))
        aligning = ALIGNMENT * len(self.parts)
        return inside + Need(fixed=self.method.facts_nbytes * len(self.inputs) + aligning)

    def learn(self, scan: Scan) -> Any:
        def look(see: Callable[[list[Tensor], Block], T], sample: int = 0) -> Any:
            for (inputs, _), start, stop in scan(self._stager(scan.worker, scan.facts, scan.dtype), sample):
                yield see(inputs(start, stop)[0], self._block(start))

        return self.method.learn(look, self.info.numel, self.parameters)

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Rows:
        inputs, base = self._stager(worker, facts, dtype)(rows)
        learnt = facts.get(id(self))

        def block(start: int, stop: int) -> Tensor:
            values, subtracted = inputs(start, stop)
            merged = self.method(values, learnt, self._block(start), self.parameters)
            if base is None:
                return merged
            return merged.add_(base(start, stop) if subtracted is None else subtracted)

        return block

    def _stager(
        self, worker: Worker, facts: Facts, dtype: torch.dtype
    ) -> Callable[[range], tuple[Callable[[int, int], _Inputs], Rows | None]]:
        def stage(rows: range) -> tuple[Callable[[int, int], _Inputs], Rows | None]:
            staged = [way.stage(rows, worker, facts, dtype) for way in self.inputs]
            base = self.base.stage(rows, worker, facts, dtype) if self.base else None

            def inputs(start: int, stop: int) -> _Inputs:
                values = [rows_of(start, stop) for rows_of in staged]
                minus = base(start, stop) if base and any(self.subtract) else None
                if minus is not None:
                    for value, less in zip(values, self.subtract, strict=True):
                        if less:
                            value.sub_(minus)
                return values, minus

            return inputs, base

        return stage

    def _block(self, start: int) -> Block:
        return Block(self.info.name, start * self.info.columns, self.seed, len(self.info.shape) < 2)
