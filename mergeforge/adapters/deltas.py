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

from mergeforge.tensors.budget import ALIGNMENT, Need, Worker, viewed
from mergeforge.tensors.lazy import Facts, Scan, Way
from mergeforge.tensors.stored import Stored

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Delta = Callable[[int, int, Any], "Tensor"]  # rows [start, stop) given W's rows (None unless it needs them)


class Edit(Protocol):
    """One adapter's change of one tensor."""

    @property
    def about(self) -> str:
        """The kind of change, for the plan."""

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on W."""

    @property
    def learns(self) -> bool:
        """Whether it must see all of W first."""

    @property
    def need(self) -> Need:
        """Memory beside W."""

    def learn(self, scan: Scan, base: Way) -> Any: ...

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Delta: ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """s * L R with L (rows, r) and R (r, columns), each perhaps stored transposed.

    W (out, in): L = lora_B, R = lora_A. GPT-2's Conv1D (in, out) and embeddings (vocabulary, dim)
    take the transposes: L = A^T, R = B^T (peft/tuners/lora/layer.py, get_delta_weight). `order`: the
    row of the stored L that each of W's rows takes, where llama.cpp has reordered them.
    """

    left: Stored
    right: Stored
    transposed: bool
    scale: float
    order: np.ndarray | None = None

    about: str = "LoRA"
    needs_base: bool = False
    learns: bool = False

    @property
    def rank(self) -> int:
        return self.left.info.shape[0] if self.transposed else self.left.info.shape[1]

    @property
    def need(self) -> Need:
        size = self.left.info.bits // 8
        fixed = self.right.info.nbytes + 8 * self.right.info.numel + ALIGNMENT * (self.rank + 1)
        fixed += self.left.info.nbytes if self.order is not None else 0
        return Need(row=self.rank * (size + 8), fixed=fixed, live=1)

    def learn(self, scan: Scan, base: Way) -> Any:
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
        return torch.cat([viewed(piece, info.dtype, len(rows)) for piece in pieces])

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Delta:
        left, right = self.factors(rows, worker, dtype)
        return lambda start, stop, base: left[start - rows.start : stop - rows.start] @ right


@dataclass(frozen=True, eq=False)
class Dora:
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353): V = W + s L R, W' = m / |V| * V.

    |V| is taken over each output's weights: over a row of W, or over a column where W is stored
    transposed (Conv1D) or is an embedding; columns need a look at the whole tensor first. `columns`:
    whether it is over columns where that is not told by how L and R are stored (MLX, LyCORIS).
    Defined by peft/tuners/lora/dora.py.
    """

    low: LowRank
    magnitude: Stored
    columns: bool | None = None

    about: str = "DoRA"
    needs_base: bool = True

    @property
    def learns(self) -> bool:
        return self.low.transposed if self.columns is None else self.columns

    @property
    def need(self) -> Need:
        return self.low.need + Need(fixed=self.magnitude.info.nbytes + 16 * self.magnitude.info.numel, live=2)

    def learn(self, scan: Scan, base: Way) -> Tensor:
        """The norms of V's columns, summed up in float64."""
        import torch

        squares = torch.zeros(base.info.columns, dtype=torch.float64, device=scan.worker.device)

        def stage(rows: range) -> tuple[Any, Tensor, Tensor, int]:
            left, right = self.low.factors(rows, scan.worker, scan.dtype)
            return base.stage(rows, scan.worker, scan.facts, scan.dtype), left, right, rows.start

        for (whole, left, right, first), start, stop in scan(stage):
            value = whole(start, stop).addmm_(left[start - first : stop - first], right)
            squares += value.square_().sum(0, dtype=torch.float64)
        return squares.sqrt().to(scan.dtype)

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Delta:
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
class Replaced:
    """Another tensor in W's place."""

    value: Stored

    about: str = "replaced"
    needs_base: bool = True
    learns: bool = False

    @property
    def need(self) -> Need:
        return self.value.need

    def learn(self, scan: Scan, base: Way) -> Any:
        return None

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Delta:
        value = self.value.stage(rows, worker, facts, dtype)
        return lambda start, stop, base: value(start, stop).sub_(base)


@dataclass(frozen=True, eq=False)
class RowsReplaced:
    """Some rows of W replaced: `indices` are the rows, `value` (rows, columns) their new content."""

    indices: tuple[int, ...]
    value: Stored

    about: str = "trained tokens"
    needs_base: bool = True
    learns: bool = False

    @property
    def need(self) -> Need:
        return Need(fixed=self.value.info.nbytes + 8 * self.value.info.numel, live=1)

    def learn(self, scan: Scan, base: Way) -> Any:
        return None

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Delta:
        value = self.value.read_all(worker).to(dtype)

        def delta(start: int, stop: int, base: Tensor) -> Tensor:
            change = base.new_zeros(base.shape)
            for row, index in enumerate(self.indices):
                if start <= index < stop:
                    change[index - start] = value[row] - base[index - start]
            return change

        return delta


@dataclass(frozen=True, eq=False)
class Added:
    """A scaled vector added to a bias."""

    value: Stored
    scale: float

    about: str = "bias"
    needs_base: bool = False
    learns: bool = False

    @property
    def need(self) -> Need:
        return self.value.need

    def learn(self, scan: Scan, base: Way) -> Any:
        return None

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Delta:
        value = self.value.stage(rows, worker, facts, dtype)
        return lambda start, stop, base: value(start, stop).mul_(self.scale)
