"""What an adapter does to one tensor: each edit yields its delta, block by block.

    LowRank        s * L R              LoRA on linear, Conv1D and embedding layers
    Dora           m / |V| * V - W      with V = W + s * L R
    Replaced       R - W                modules_to_save, trained biases
    RowsReplaced   rows of the above    trainable tokens
    Added          s * v                lora_bias

W is the tensor as it is stored; an edit's shape is always W's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker, view_rows
from mergeforge.tensors.lazy import Stats, StatsPass, LazyTensor
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Delta = Callable[[int, int, Any], "Tensor"]  # rows [start, stop) given W's rows (None unless it needs them)


class WeightDelta(Protocol):
    """One adapter's change of one tensor."""

    @property
    def label(self) -> str:
        """The kind of change, for the plan."""

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on W."""

    @property
    def needs_stats(self) -> bool:
        """Whether it must see all of W first."""

    @property
    def memory_cost(self) -> MemoryCost:
        """Memory beside W."""

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any: ...

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta: ...


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """s * L R with L (rows, r) and R (r, columns), each perhaps stored transposed.

    W (out, in): L = lora_B, R = lora_A. GPT-2's Conv1D (in, out) and embeddings (vocabulary, dim)
    take the transposes: L = A^T, R = B^T (peft/tuners/lora/layer.py, get_delta_weight). `order`: the
    row of the stored L that each of W's rows takes, where llama.cpp has reordered them.
    """

    left: StoredTensor
    right: StoredTensor
    transposed: bool
    scale: float
    order: np.ndarray | None = None

    label: str = "LoRA"
    needs_base: bool = False
    needs_stats: bool = False

    @property
    def rank(self) -> int:
        return self.left.info.shape[0] if self.transposed else self.left.info.shape[1]

    @property
    def memory_cost(self) -> MemoryCost:
        size = self.left.info.bits // 8
        fixed = self.right.info.nbytes + 8 * self.right.info.numel + ALIGNMENT * (self.rank + 1)
        fixed += self.left.info.nbytes if self.order is not None else 0
        return MemoryCost(row_nbytes=self.rank * (size + 8), fixed_nbytes=fixed, scratch_blocks=1)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """L and R, whole and in float64, without the scale; for comparisons while planning."""
        left, right = self.left.whole(), self.right.whole()
        left = left if self.order is None else left[self.order]
        return (left.t(), right.t()) if self.transposed else (left, right)

    def factors(self, rows: range, worker: Worker, dtype: torch.dtype, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """weight * s * L for the rows, and R."""
        import torch

        right = self.right.read_all(worker).to(dtype)
        if self.transposed:
            left, right = self._columns_of_left(rows, worker).t().to(dtype), right.t()
        elif self.order is not None:
            chosen = torch.from_numpy(self.order[rows.start : rows.stop]).to(worker.device)
            left = self.left.read_all(worker).index_select(0, chosen).to(dtype)
        else:
            left = self.left.read(rows, worker, keep=True).to(dtype)
        return left * (weight * self.scale), right

    def _columns_of_left(self, rows: range, worker: Worker) -> Tensor:
        """(r, rows) of L stored as (r, all rows): one short read for each of the r rows."""
        import torch

        info, size = self.left.info, self.left.info.bits // 8
        starts = [self.left.offset + (row * info.columns + rows.start) * size for row in range(self.rank)]
        pieces = [worker.read(self.left.file, start, len(rows) * size, keep=True) for start in starts]
        return torch.cat([view_rows(piece, info.dtype, len(rows)) for piece in pieces])

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        left, right = self.factors(rows, worker, dtype)
        return lambda start, stop, base: left[start - rows.start : stop - rows.start] @ right


@dataclass(frozen=True, eq=False)
class DoraDelta:
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353): V = W + s L R, W' = m / |V| * V.

    |V| is taken over each output's weights: over a row of W, or over a column where W is stored
    transposed (Conv1D) or is an embedding; columns need a look at the whole tensor first. `columns`:
    whether it is over columns where that is not told by how L and R are stored (MLX, LyCORIS).
    Defined by peft/tuners/lora/dora.py.
    """

    low: LoraDelta
    magnitude: StoredTensor
    columns: bool | None = None

    label: str = "DoRA"
    needs_base: bool = True

    @property
    def needs_stats(self) -> bool:
        return self.low.transposed if self.columns is None else self.columns

    @property
    def memory_cost(self) -> MemoryCost:
        return self.low.memory_cost + MemoryCost(
            fixed_nbytes=self.magnitude.info.nbytes + 16 * self.magnitude.info.numel, scratch_blocks=2
        )

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Tensor:
        """The norms of V's columns, summed up in float64."""
        import torch

        squares = torch.zeros(base.info.columns, dtype=torch.float64, device=scan.worker.device)

        def stage(rows: range) -> tuple[Any, Tensor, Tensor, int]:
            left, right = self.low.factors(rows, scan.worker, scan.dtype)
            return base.load(rows, scan.worker, scan.facts, scan.dtype), left, right, rows.start

        for (whole, left, right, first), start, stop in scan(stage):
            value = whole(start, stop).addmm_(left[start - first : stop - first], right)
            squares += value.square_().sum(0, dtype=torch.float64)
        return squares.sqrt().to(scan.dtype)

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        left, right = self.low.factors(rows, worker, dtype)
        magnitude = self.magnitude.read_all(worker).to(dtype).flatten()
        columns = facts.get(id(self))

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            value = base.addmm(left[start - rows.start : stop - rows.start], right)
            if columns is not None:
                return value.mul_(magnitude / columns).sub_(base)
            norm = value.norm(dim=1, keepdim=True)
            return value.mul_(magnitude[start:stop].unsqueeze(1) / norm).sub_(base)

        return delta


@dataclass(frozen=True, eq=False)
class ReplaceTensor:
    """Another tensor in W's place."""

    value: StoredTensor

    label: str = "replaced"
    needs_base: bool = True
    needs_stats: bool = False

    @property
    def memory_cost(self) -> MemoryCost:
        return self.value.memory_cost

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        value = self.value.load(rows, worker, facts, dtype)
        return lambda start, stop, base: value(start, stop).sub_(base)


@dataclass(frozen=True, eq=False)
class ReplaceRows:
    """Some rows of W replaced: `indices` are the rows, `value` (rows, columns) their new content."""

    indices: tuple[int, ...]
    value: StoredTensor

    label: str = "trained tokens"
    needs_base: bool = True
    needs_stats: bool = False

    @property
    def memory_cost(self) -> MemoryCost:
        return MemoryCost(fixed_nbytes=self.value.info.nbytes + 8 * self.value.info.numel, scratch_blocks=1)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        value = self.value.read_all(worker).to(dtype)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            change = base.new_zeros(base.shape)
            for row, index in enumerate(self.indices):
                if start <= index < stop:
                    change[index - start] = value[row] - base[index - start]
            return change

        return delta


@dataclass(frozen=True, eq=False)
class AddTensor:
    """A scaled vector added to a bias."""

    value: StoredTensor
    scale: float

    label: str = "bias"
    needs_base: bool = False
    needs_stats: bool = False

    @property
    def memory_cost(self) -> MemoryCost:
        return self.value.memory_cost

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        value = self.value.load(rows, worker, facts, dtype)
        return lambda start, stop, base: value(start, stop).mul_(self.scale)
