"""The deltas that an adapter adds to one tensor, computed block by block.

    LoraDelta       s * L R              LoRA on linear, Conv1D and embedding layers
    DoraDelta       m / |V| * V - W      with V = W + s * L R
    ReplaceTensor   R - W                modules_to_save, trained biases
    ReplaceRows     some rows of R - W   trainable tokens
    AddTensor       s * v                lora_bias

W is the base's tensor as it is stored; a delta always has W's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergeforge.adapters.peft.kind import Delta
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor, same_content
from mergeforge.tensors.worker import ALIGNMENT, Worker, view_rows

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


class WeightDelta(Protocol):
    """One adapter's change of one tensor."""

    @property
    def label(self) -> str:
        """The name of this kind of delta, for the plan."""

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on W."""

    @property
    def needs_stats(self) -> bool:
        """Whether it must read all of W first."""

    @property
    def memory_cost(self) -> MemoryCost:
        """Memory in addition to W's."""

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any: ...

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta: ...


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """s * L R with L (rows, r) and R (r, columns); `transposed`: both are stored transposed.

    For W (out, in), L is lora_B and R is lora_A. For GPT-2's Conv1D (in, out) and embeddings (vocabulary, dim),
    L = A^T and R = B^T (peft/tuners/lora/layer.py, get_delta_weight). `row_order`: the row of the stored L for
    each row of W, where llama.cpp has reordered them. `right_transposed`: R alone is stored transposed, as llama.cpp
    does for an embedding.
    """

    left: StoredTensor
    right: StoredTensor
    transposed: bool
    scale: float
    row_order: np.ndarray | None = None
    right_transposed: bool = False

    label: str = "LoRA"
    needs_base: bool = False
    needs_stats: bool = False

    @property
    def rank(self) -> int:
        return self.left.info.shape[0] if self.transposed else self.left.info.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of L R."""
        left, right = self.left.info.shape, self.right.info.shape
        return left[self.transposed], right[0 if self.transposed or self.right_transposed else 1]

    @property
    def memory_cost(self) -> MemoryCost:
        size = self.left.info.bits // 8
        fixed = self.right.info.nbytes + 8 * self.right.info.numel + ALIGNMENT * (self.rank + 1)
        fixed += self.left.info.nbytes if self.row_order is not None else 0
        return MemoryCost(row_nbytes=self.rank * (size + 8), fixed_nbytes=fixed, scratch_blocks=1)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def read_factors(self) -> tuple[Tensor, Tensor]:
        """L and R, whole and in float64, without the scale; for planning and for combining adapters."""
        left, right = self.left.read_float64(), self.right.read_float64()
        left = left if self.row_order is None else left[self.row_order]
        right = right.t() if self.right_transposed else right
        return (left.t(), right.t()) if self.transposed else (left, right)

    def factors(self, rows: range, worker: Worker, dtype: torch.dtype, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """weight * s * L for the rows, and R."""
        import torch

        right = self.right.read_all(worker).to(dtype)
        right = right.t() if self.right_transposed else right
        if self.transposed:
            left, right = self._columns_of_left(rows, worker).t().to(dtype), right.t()
        elif self.row_order is not None:
            chosen = torch.from_numpy(self.row_order[rows.start : rows.stop]).to(worker.device)
            left = self.left.read_all(worker).index_select(0, chosen).to(dtype)
        else:
            left = self.left.read(rows, worker, keep=True).to(dtype)
        return left * (weight * self.scale), right

    def _columns_of_left(self, rows: range, worker: Worker) -> Tensor:
        """(r, rows) of an L stored as (r, all rows): one short read per rank."""
        import torch

        info, size = self.left.info, self.left.info.bits // 8
        starts = [self.left.offset + (row * info.columns + rows.start) * size for row in range(self.rank)]
        buffers = [worker.read(self.left.file, start, len(rows) * size, keep=True) for start in starts]
        return torch.cat([view_rows(buffer, info.dtype, len(rows)) for buffer in buffers])

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
        left, right = self.factors(rows, worker, dtype)
        return lambda start, stop, base: left[start - rows.start : stop - rows.start] @ right


@dataclass(frozen=True, eq=False)
class DoraDelta:
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353): V = W + s L R, W' = m / |V| * V.

    |V| is the norm of each output's weights: of a row of W, or of a column if W is stored transposed (Conv1D) or
    is an embedding. Norms of columns take a first pass over the whole tensor. `norm_over_columns`: set where the
    layout of L and R does not decide it (MLX, LyCORIS). Defined by peft/tuners/lora/dora.py.
    """

    lora: LoraDelta
    magnitude: StoredTensor
    norm_over_columns: bool | None = None

    label: str = "DoRA"
    needs_base: bool = True

    @property
    def needs_stats(self) -> bool:
        return self.lora.transposed if self.norm_over_columns is None else self.norm_over_columns

    @property
    def memory_cost(self) -> MemoryCost:
        return self.lora.memory_cost + MemoryCost(
            fixed_nbytes=self.magnitude.info.nbytes + 16 * self.magnitude.info.numel, scratch_blocks=2
        )

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Tensor:
        """The norms of V's columns, accumulated in float64."""
        import torch

        squares = torch.zeros(base.info.columns, dtype=torch.float64, device=scan.worker.device)

        def stage(rows: range) -> tuple[Any, Tensor, Tensor, int]:
            left, right = self.lora.factors(rows, scan.worker, scan.dtype)
            return base.load(rows, scan.worker, scan.stats, scan.dtype), left, right, rows.start

        for (whole, left, right, first), start, stop in scan(stage):
            value = whole(start, stop).addmm_(left[start - first : stop - first], right)
            squares += value.square_().sum(0, dtype=torch.float64)
        return squares.sqrt().to(scan.dtype)

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
        left, right = self.lora.factors(rows, worker, dtype)
        magnitude = self.magnitude.read_all(worker).to(dtype).flatten()
        columns = stats.get(id(self))

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            value = base.addmm(left[start - rows.start : stop - rows.start], right)
            if columns is not None:
                return value.mul_(magnitude / columns).sub_(base)
            norm = value.norm(dim=1, keepdim=True)
            return value.mul_(magnitude[start:stop].unsqueeze(1) / norm).sub_(base)

        return delta


@dataclass(frozen=True, eq=False)
class ReplaceTensor:
    """Replace W by another tensor."""

    value: StoredTensor

    label: str = "replaced"
    needs_base: bool = True
    needs_stats: bool = False

    @property
    def memory_cost(self) -> MemoryCost:
        return self.value.memory_cost

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
        value = self.value.load(rows, worker, stats, dtype)
        return lambda start, stop, base: value(start, stop).sub_(base)


@dataclass(frozen=True, eq=False)
class ReplaceRows:
    """Replace some rows of W: rows `indices` become `value` (rows, columns)."""

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

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
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
    """Add a scaled tensor of W's shape, such as a bias."""

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

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
        value = self.value.load(rows, worker, stats, dtype)
        return lambda start, stop, base: value(start, stop).mul_(self.scale)


def same_deltas(first: Sequence[WeightDelta], second: Sequence[WeightDelta]) -> bool:
    """Whether an adapter changes two tensors alike, each by one delta."""
    return len(first) == len(second) == 1 and _same_delta(first[0], second[0])


def _same_delta(first: WeightDelta, second: WeightDelta) -> bool:
    """Whether the deltas of two tied tensors are equal (ensure_weight_tying saves both)."""
    if isinstance(first, ReplaceRows) and isinstance(second, ReplaceRows):
        return first.indices == second.indices and same_content(first.value, second.value)
    if isinstance(first, LoraDelta) and isinstance(second, LoraDelta):
        factors = zip(first.read_factors(), second.read_factors(), strict=True)
        return first.scale == second.scale and all(left.equal(right) for left, right in factors)
    return False
