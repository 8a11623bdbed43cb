"""LoRA whose initialization took something from the weight, folded into the original: that is subtracted again.

    pissa   the r largest singular triplets of W   (https://arxiv.org/abs/2404.02948)
    olora   Q_r R_r of W = Q R, times the scale    (https://arxiv.org/abs/2406.01775)
    kasa    the r smallest singular triplets of W  (https://arxiv.org/abs/2412.06071)

All three are products of two thin matrices that depend on W alone; PEFT computes them again whenever it loads
such an adapter (peft/tuners/lora/layer.py, pissa_init and olora_init; variants.py, KasaLinearVariant). The
singular vectors are eigenvectors of the smaller Gram matrix in float64, so W itself need not fit into memory
unless it has more columns than rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import LoraDelta
from mergeforge.adapters.peft.kind import Delta
from mergeforge.core.bottom_triplets import bottom_triplets, read_dense, to_double
from mergeforge.core.low_rank_svd import svd_dense, svd_gram, svd_gram_nbytes
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NAMES = {"pissa": "PiSSA", "olora": "OLoRA", "kasa": "KaSA"}


@dataclass(frozen=True, eq=False)
class ResidualInitDelta:
    """s * L R minus what the initialization took from W; with a `diagonal` d (r), s * L diag(d) R.

    `shape`: of W as it is stored.
    """

    lora: LoraDelta
    init: str
    shape: tuple[int, int]
    diagonal: StoredTensor | None = None

    needs_base: bool = False
    needs_stats: bool = True

    @property
    def label(self) -> str:
        return f"{_NAMES[self.init]} on the original"

    @property
    def memory_cost(self) -> MemoryCost:
        rows, columns = self.shape
        thin_factors = 12 * self.lora.rank * (rows + columns) + ALIGNMENT
        dense = 4 * rows * columns if columns > rows else 0
        work = (
            32 * self.lora.rank * rows if self.init == "olora" else svd_gram_nbytes(self.shape, self.lora.rank) + dense
        )
        return self.lora.memory_cost + MemoryCost(fixed_nbytes=thin_factors + work, scratch_blocks=2)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> tuple[Tensor, Tensor]:
        """What the initialization took from W, as two thin matrices."""

        def read_blocks() -> Iterator[tuple[int, Tensor]]:
            staged = scan(lambda rows: base.load(rows, scan.worker, scan.stats, scan.dtype))
            return ((start, whole(start, stop)) for whole, start, stop in staged)

        rank = self.lora.rank
        if self.init == "olora":
            left, right = _qr_of_first_columns(read_blocks, rank)
            left = left.mul_(self.lora.scale)
        elif self.init == "kasa":
            left, right = bottom_triplets(read_blocks, self.shape, rank)
        else:
            left, right = _top_triplets(read_blocks, self.shape, rank)
        device = scan.worker.device
        return left.to(device, scan.dtype), right.to(device, scan.dtype)

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
        left, right = self.lora.factors(rows, worker, dtype)
        if self.diagonal is not None:
            left = left * self.diagonal.read_all(worker).to(dtype).flatten()
        from_init_left, from_init_right = stats[id(self)]

        def delta(start: int, stop: int, base: Any) -> Tensor:
            change: Tensor = left[start - rows.start : stop - rows.start] @ right
            return change.addmm_(from_init_left[start:stop], from_init_right, alpha=-1)

        return delta


def _top_triplets(read_blocks: Any, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    is_wide = shape[1] > shape[0]
    factors = svd_dense(read_dense(read_blocks, shape), rank) if is_wide else svd_gram(read_blocks, shape, rank)
    return factors.left, factors.right


def _qr_of_first_columns(read_blocks: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Q_r and R_r of W = Q R: Q_r spans W's first r columns, R_r = Q_r^T W. Takes two passes."""
    import torch

    basis = torch.linalg.qr(torch.cat([to_double(rows[:, :rank]) for _, rows in read_blocks()])).Q
    right: Any = 0
    for start, rows in read_blocks():
        right = right + basis[start : start + len(rows)].t() @ to_double(rows)
    return basis, right
