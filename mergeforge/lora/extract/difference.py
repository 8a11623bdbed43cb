"""The difference of two stored tensors: read once and kept in memory, or, if it does not fit, read in every pass.

The memory that a worker needs for a pair depends on its shape and the rank only, so it is proved before any
weight is read. The result does not depend on the memory limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergeforge.core.low_rank_svd import SquareSum, is_gram_cheaper, svd_gram_nbytes, svd_randomized_nbytes
from mergeforge.core.sizes import format_size
from mergeforge.core.tensor_info import TILE_NBYTES, TensorInfo, split_into_tiles
from mergeforge.errors import BudgetError
from mergeforge.lora.extract.pairing import TensorPair
from mergeforge.tensors.budget import MAX_THREADS, Budget, cpu_count
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    from torch import Tensor

SCRATCH_BLOCKS = 6  # alive at once: both models' blocks, the difference, its float64 copy (two), the residual
ALIGNMENT_NBYTES = 8 * ALIGNMENT


@dataclass(frozen=True)
class PairTask:
    """A pair, its method ("exact", "randomized", or "" to only measure the difference) and its memory.

    `tile_rows`: rows read at once; `in_memory`: the difference stays in memory; `staging_nbytes`: size of the
    worker's staging buffer.
    """

    pair: TensorPair
    method: str
    tile_rows: int
    in_memory: bool
    staging_nbytes: int


@dataclass(frozen=True)
class RankTarget:
    """The factors to compute. `rank`: the maximum, None for any; `svd`: auto, exact or randomized."""

    rank: int | None
    energy: float | None
    svd: str


def plan_tasks(pairs: Sequence[TensorPair], target: RankTarget, budget: Budget) -> tuple[list[PairTask], Budget]:
    """Return a task for every pair, and the budget with its number of workers. Raises BudgetError."""
    methods = [_method(pair, target, replace(budget, threads=1)) for pair in pairs]
    for threads in [budget.threads] if budget.threads else range(min(cpu_count(), MAX_THREADS), 0, -1):
        budget_per_count = replace(budget, threads=threads)
        tasks = [_task(pair, method, target, budget_per_count) for pair, method in zip(pairs, methods, strict=True)]
        if all(task is not None for task in tasks):
            return [task for task in tasks if task is not None], budget_per_count
    pair, method = next(
        item for item, task in zip(zip(pairs, methods, strict=True), tasks, strict=True) if task is None
    )
    needs = (
        _fixed_nbytes(pair, method, target)
        + _scratch_nbytes(pair.tuned.info)
        + budget.buffer_copies * (_row_nbytes(pair) + ALIGNMENT_NBYTES)
    )
    needs += _matrix_nbytes(pair) if method == "exact" and pair.tuned.info.rows < pair.tuned.info.columns else 0
    needs += budget.buffer_copies * _row_nbytes(pair) * pair.tuned.info.block_rows
    hint = f"set --memory {-(-needs >> 20)}MiB or more, with --threads 1"
    if method == "exact":
        hint += "; or --svd randomized with a --rank"
    available = format_size(budget_per_count.per_worker)
    text = f"{pair.name} needs {format_size(needs)} for one worker, but only {available} is available"
    raise BudgetError(text, hint=hint)


def _method(pair: TensorPair, target: RankTarget, budget: Budget) -> str:
    """The cheaper method for this shape and rank; `auto` falls back to randomized if exact does not fit."""
    if pair.treatment != "factor":
        return ""
    if target.svd != "auto":
        return target.svd
    if not is_gram_cheaper(_shape(pair.tuned.info), target.rank):
        return "randomized"
    fits = target.rank is None or _task(pair, "exact", target, budget) is not None
    return "exact" if fits else "randomized"


def _task(pair: TensorPair, method: str, target: RankTarget, budget: Budget) -> PairTask | None:
    """Fit a pair into one worker's share of the memory; None if the share is too small."""
    info = pair.tuned.info
    available = budget.per_worker - _fixed_nbytes(pair, method, target) - _scratch_nbytes(info)
    row_nbytes, block_nbytes = _row_nbytes(pair), _row_nbytes(pair) * info.block_rows
    in_memory = bool(method) and available - _matrix_nbytes(pair) >= budget.buffer_copies * (
        block_nbytes + ALIGNMENT_NBYTES
    )
    if method == "exact" and info.rows < info.columns and not in_memory:
        return None
    available = (available - in_memory * _matrix_nbytes(pair)) // budget.buffer_copies - ALIGNMENT_NBYTES
    if available < block_nbytes:
        return None
    tile = split_into_tiles(info, min(available, TILE_NBYTES) // max(row_nbytes, 1))[0] if info.rows else None
    rows = tile.rows if tile else 0
    return PairTask(pair, method, rows, in_memory, rows * row_nbytes + ALIGNMENT_NBYTES)


def _fixed_nbytes(pair: TensorPair, method: str, target: RankTarget) -> int:
    shape = _shape(pair.tuned.info)
    if method == "exact":
        return svd_gram_nbytes(shape, target.rank)
    return svd_randomized_nbytes(shape, target.rank or min(shape)) if method else 0


def _scratch_nbytes(info: TensorInfo) -> int:
    return SCRATCH_BLOCKS * 4 * info.block_rows * info.columns


def _row_nbytes(pair: TensorPair) -> int:
    return pair.base.info.row_nbytes + pair.tuned.info.row_nbytes


def _matrix_nbytes(pair: TensorPair) -> int:
    return 4 * pair.tuned.info.numel


def _shape(info: TensorInfo) -> tuple[int, int]:
    return info.rows, info.columns


@dataclass
class PairDifference:
    """tuned - base in float32, for several passes; each pass reads the files unless the matrix is in memory."""

    task: PairTask
    worker: Worker
    matrix: Tensor | None = None
    base_square: SquareSum = field(default_factory=SquareSum)

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.task.pair.tuned.info)

    def scan(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, block of rows); block heights depend on the shape only. A block is valid until the next."""
        if self.matrix is not None:
            height = self.task.pair.tuned.info.block_rows
            for start in range(0, self.shape[0], height):
                yield start, self.matrix[start : start + height]
            return
        yield from self._read(keep=True)

    def last_scan(self) -> Iterator[tuple[int, Tensor]]:
        """The same for the last pass: the page cache may drop the files' bytes afterwards."""
        yield from self.scan() if self.matrix is not None else self._read(keep=False)

    def load_matrix(self) -> Tensor:
        """Read the whole difference (rows, columns) into memory."""
        import torch

        matrix = torch.empty(self.shape, dtype=torch.float32, device=self.worker.device)
        for start, rows in self._read(keep=False):
            matrix[start : start + len(rows)] = rows
        self.matrix = matrix
        return matrix

    def norms(self) -> tuple[float, float]:
        """The Frobenius norms |tuned - base| and |base|, in float64."""
        change = SquareSum()
        for _, rows in self._read(keep=False):
            change.add(rows)
        return math.sqrt(change.value), math.sqrt(self.base_square.value)

    def is_same(self) -> bool:
        """Whether both tensors have the same bytes; for tensors that are not floats."""
        base, tuned = self.task.pair.base, self.task.pair.tuned
        chunk = max((self.task.staging_nbytes - ALIGNMENT_NBYTES) // 2, 1)
        for offset in range(0, base.info.nbytes, chunk):
            self.worker.clear()
            size = min(chunk, base.info.nbytes - offset)
            left = self.worker.read(base.file, base.offset + offset, size)
            if not bool((left == self.worker.read(tuned.file, tuned.offset + offset, size)).all()):
                return False
        return base.info.dtype == tuned.info.dtype

    def _read(self, *, keep: bool) -> Iterator[tuple[int, Tensor]]:
        import torch

        pair, info, worker = self.task.pair, self.task.pair.tuned.info, self.worker
        wide = "F64" in (pair.base.info.dtype, info.dtype)
        dtype = torch.float64 if wide else torch.float32
        for tile in split_into_tiles(info, self.task.tile_rows):
            worker.clear()
            rows = range(tile.start, tile.stop)
            left, right = (stored.read(rows, worker, keep=keep) for stored in (pair.base, pair.tuned))
            for start in range(0, len(rows), info.block_rows):
                shape = (min(info.block_rows, len(rows) - start), info.columns)
                base = worker.scratch(0, shape, dtype).copy_(left[start : start + shape[0]])
                if not self.task.method:
                    self.base_square.add(base)
                change = worker.scratch(1, shape, dtype).copy_(right[start : start + shape[0]]).sub_(base)
                yield tile.start + start, change.float()
