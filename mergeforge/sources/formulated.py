"""An adapter kind's formula as an edit: its factors are read whole, W's rows come as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.kinds import Formula
from mergeforge.budget import ALIGNMENT, Need, Worker
from mergeforge.sources import Facts, Rows, Scan, Way
from mergeforge.sources.stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Formulated:
    """One formula on one tensor. `base`: W itself, read in whole groups of rows where the formula reaches over blocks.

    `inner`: rows of W for each row of the formula's: a Conv1d's (out, in, width) is stored as out * in rows.
    """

    formula: Formula
    factors: Mapping[str, Stored]
    base: Way
    inner: int = 1

    learns: bool = False

    @property
    def about(self) -> str:
        return self.formula.about

    @property
    def needs_base(self) -> bool:
        return self.formula.needs_base and self.formula.reach == 1

    @property
    def need(self) -> Need:
        read = sum(one.info.nbytes + 4 * one.info.numel + ALIGNMENT for one in self.factors.values())
        own = Need(fixed=read + self.formula.fixed, live=self.formula.live)
        if self.formula.reach == 1:
            return own
        groups = 2 * self.formula.reach * self.base.info.row_nbytes
        return own + self.base.need + Need(fixed=groups, live=self.base.need.live + self.formula.live)

    def learn(self, scan: Scan, base: Way) -> Any:
        return None

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Any:  # sources.edits.Delta
        delta = self.formula.prepare({role: _read(one, worker, dtype) for role, one in self.factors.items()})
        if self.inner > 1:
            return self._finer(delta)
        if self.formula.reach == 1:
            return delta
        wide = range(self._down(rows.start), min(self._up(rows.stop), self.base.info.rows))
        return self._grouped(delta, self.base.stage(wide, worker, facts, dtype))

    def _down(self, row: int) -> int:
        return row // self.formula.reach * self.formula.reach

    def _up(self, row: int) -> int:
        return -(-row // self.formula.reach) * self.formula.reach

    def _grouped(self, delta: Any, whole: Rows) -> Any:
        def grouped(start: int, stop: int, base: Any) -> Tensor:
            first, last = self._down(start), self._up(stop)
            changed: Tensor = delta(first, last, whole(first, last))
            return changed[start - first : stop - first]

        return grouped

    def _finer(self, delta: Any) -> Any:
        def finer(start: int, stop: int, base: Any) -> Tensor:
            first = start // self.inner
            changed: Tensor = delta(first, -(-stop // self.inner), None)
            rows = changed.reshape(len(changed) * self.inner, -1)
            return rows[start - first * self.inner : stop - first * self.inner]

        return finer


def _read(stored: Stored, worker: Worker, dtype: torch.dtype) -> Tensor:
    """All of a factor in its shape: floats in the dtype of the computation, indices as they are."""
    value = stored.read_all(worker).view(stored.info.shape)
    return value.to(dtype) if value.is_floating_point() else value.clone()
