"""LoRA that was started from the weight itself, folded into the original weight: what the start took out goes first.

    pissa   the r largest singular triplets of W   (https://arxiv.org/abs/2404.02948)
    olora   Q_r R_r of W = Q R, times the scale    (https://arxiv.org/abs/2406.01775)
    kasa    the r smallest singular triplets of W  (https://arxiv.org/abs/2412.06071)

All three are products of two thin matrices that follow from W alone, as PEFT computes them again whenever it
loads such an adapter (peft/tuners/lora/layer.py, pissa_init and olora_init; variants.py, KasaLinearVariant).
The singular vectors are those of the smaller Gram matrix in float64, so W itself need not fit into memory
unless it is wider than high.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import Delta, LoraDelta
from mergeforge.core.low_rank_svd import exact, exact_held, exact_nbytes
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Stats, StatsPass, LazyTensor
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PIECE = 4096  # columns
_NAMES = {"pissa": "PiSSA", "olora": "OLoRA", "kasa": "KaSA"}


@dataclass(frozen=True, eq=False)
class ResidualInitDelta:
    """s * L R minus what the start took out of W; with a `diagonal` d (r), s * L diag(d) R.

    `shape`: W's as it is stored.
    """

    low: LoraDelta
    start: str
    shape: tuple[int, int]
    diagonal: StoredTensor | None = None

    needs_base: bool = False
    needs_stats: bool = True

    @property
    def label(self) -> str:
        return f"{_NAMES[self.start]} on the original"

    @property
    def memory_cost(self) -> MemoryCost:
        rows, columns = self.shape
        kept = 12 * self.low.rank * (rows + columns) + ALIGNMENT
        held = 4 * rows * columns if columns > rows else 0
        work = 32 * self.low.rank * rows if self.start == "olora" else exact_nbytes(self.shape, self.low.rank) + held
        return self.low.memory_cost + MemoryCost(fixed_nbytes=kept + work, scratch_blocks=2)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> tuple[Tensor, Tensor]:
        """What the start took out, as two thin matrices."""

        def look() -> Iterator[tuple[int, Tensor]]:
            staged = scan(lambda rows: base.load(rows, scan.worker, scan.facts, scan.dtype))
            return ((start, whole(start, stop)) for whole, start, stop in staged)

        rank = self.low.rank
        if self.start == "olora":
            left, right = _first_columns(look, rank)
            left = left.mul_(self.low.scale)
        elif self.shape[1] > self.shape[0]:
            matrix = _held(look, self.shape)
            left, right = _largest_held(matrix, rank) if self.start == "pissa" else _smallest_held(matrix, rank)
        else:
            left, right = _largest(look, self.shape, rank) if self.start == "pissa" else _smallest(look, rank)
        device = scan.worker.device
        return left.to(device, scan.dtype), right.to(device, scan.dtype)

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        left, right = self.low.factors(rows, worker, dtype)
        if self.diagonal is not None:
            left = left * self.diagonal.read_all(worker).to(dtype).flatten()
        taken, out = facts[id(self)]

        def delta(start: int, stop: int, base: Any) -> Tensor:
            change: Tensor = left[start - rows.start : stop - rows.start] @ right
            return change.addmm_(taken[start:stop], out, alpha=-1)

        return delta


def _largest(look: Any, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    found = exact(look, shape, rank)
    return found.left, found.right


def _largest_held(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    found = exact_held(matrix, rank)
    return found.left, found.right


def _smallest(look: Any, rank: int) -> tuple[Tensor, Tensor]:
    """W V V^T, with V the right singular vectors of the smallest singular values. Two looks."""
    import torch

    gram: Any = 0
    for _, rows in look():
        wide = _double(rows)
        gram = gram + wide.t() @ wide
    vectors = _last_vectors(gram, rank)
    return torch.cat([_double(rows) @ vectors for _, rows in look()]), vectors.t()


def _smallest_held(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U U^T W of a matrix that is wider than high."""
    gram: Any = 0
    for start in range(0, matrix.shape[1], _PIECE):
        wide = _double(matrix[:, start : start + _PIECE])
        gram = gram + wide @ wide.t()
    vectors = _last_vectors(gram, rank).to(matrix)
    return vectors, vectors.t() @ matrix


def _last_vectors(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the smallest eigenvalues, as columns; none where the weights are not finite."""
    import torch

    if not bool(gram.diagonal().sum().isfinite()):
        return gram[:, :0]
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, :rank].contiguous()


def _first_columns(look: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Q_r and R_r of W = Q R: Q_r spans W's first r columns, R_r = Q_r^T W. Two looks."""
    import torch

    basis = torch.linalg.qr(torch.cat([_double(rows[:, :rank]) for _, rows in look()])).Q
    right: Any = 0
    for start, rows in look():
        right = right + basis[start : start + len(rows)].t() @ _double(rows)
    return basis, right


def _double(rows: Tensor) -> Tensor:
    """In float64: on the CPU where the device has none."""
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def _held(look: Any, shape: tuple[int, int]) -> Tensor:
    """All of W in float32."""
    matrix: Tensor | None = None
    for start, rows in look():
        matrix = rows.new_empty(shape) if matrix is None else matrix
        matrix[start : start + len(rows)].copy_(rows)
    assert matrix is not None
    return matrix
