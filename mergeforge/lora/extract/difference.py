"""The difference of two stored tensors, in the memory that there is: read once and held, or read at each look.

How much one worker needs for a pair follows from its shape and the rank alone, so the memory is
proved before anything is read, and what is computed does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergeforge.core.low_rank_svd import SquareSum, exact_nbytes, is_exact_cheaper, randomised_nbytes
from mergeforge.core.sizes import show_size
from mergeforge.core.tensor_info import TensorInfo, split_into_tiles
from mergeforge.errors import BudgetError
from mergeforge.lora.extract.pairing import Pair
from mergeforge.tensors.budget import ALIGNMENT, MAX_THREADS, Budget, Worker, cores

if TYPE_CHECKING:
    from torch import Tensor

TILE_NBYTES = 16 << 20
LIVE = 6  # blocks that exist at once: both models', their difference, its float64 copy (two), what remains
SLACK = 8 * ALIGNMENT


@dataclass(frozen=True)
class Job:
    """A pair with its method ("exact", "randomised", or "" where only its size is asked) and memory.

    `tile_rows`: rows staged at once; `held`: the difference stays in memory; `staging`: bytes of the
    worker's buffer.
    """

    pair: Pair
    method: str
    tile_rows: int
    held: bool
    staging: int


@dataclass(frozen=True)
class Wanted:
    """What the factors should be: `rank` None takes any; `svd` is auto, exact or randomised."""

    rank: int | None
    energy: float | None
    svd: str


def plan_jobs(pairs: Sequence[Pair], wanted: Wanted, budget: Budget) -> tuple[list[Job], Budget]:
    """A job for every pair, and the budget with its number of workers. Raises BudgetError."""
    methods = [_method(pair, wanted, replace(budget, threads=1)) for pair in pairs]
    for threads in [budget.threads] if budget.threads else range(min(cores(), MAX_THREADS), 0, -1):
        tried = replace(budget, threads=threads)
        jobs = [_job(pair, method, wanted, tried) for pair, method in zip(pairs, methods, strict=True)]
        if all(job is not None for job in jobs):
            return [job for job in jobs if job is not None], tried
    pair, method = next(one for one, job in zip(zip(pairs, methods, strict=True), jobs, strict=True) if job is None)
    needs = _fixed(pair, method, wanted) + _live(pair.tuned.info) + budget.buffer_copies * (_row_nbytes(pair) + SLACK)
    needs += _square_nbytes(pair) if method == "exact" and pair.tuned.info.rows < pair.tuned.info.columns else 0
    needs += budget.buffer_copies * _row_nbytes(pair) * pair.tuned.info.block_rows
    hint = f"--memory {-(-needs >> 20)}MiB --threads 1, or more"
    if method == "exact":
        hint += "; or --svd randomised with --rank"
    text = f"{pair.name} needs {show_size(needs)} for one worker, {show_size(tried.per_worker)} given"
    raise BudgetError(text, hint=hint)


def _method(pair: Pair, wanted: Wanted, budget: Budget) -> str:
    """By shape and rank; where that is the exact one and does not fit, `auto` takes the other."""
    if pair.way != "factor":
        return ""
    if wanted.svd != "auto":
        return wanted.svd
    if not is_exact_cheaper(_shape(pair.tuned.info), wanted.rank):
        return "randomised"
    fits = wanted.rank is None or _job(pair, "exact", wanted, budget) is not None
    return "exact" if fits else "randomised"


def _job(pair: Pair, method: str, wanted: Wanted, budget: Budget) -> Job | None:
    """How a worker with its share does it; None where the share is too small."""
    info = pair.tuned.info
    room = budget.per_worker - _fixed(pair, method, wanted) - _live(info)
    row, least = _row_nbytes(pair), _row_nbytes(pair) * info.block_rows
    held = bool(method) and room - _square_nbytes(pair) >= budget.buffer_copies * (least + SLACK)
    if method == "exact" and info.rows < info.columns and not held:
        return None
    room = (room - held * _square_nbytes(pair)) // budget.buffer_copies - SLACK
    if room < least:
        return None
    tile = split_into_tiles(info, min(room, TILE_NBYTES) // max(row, 1))[0] if info.rows else None
    rows = tile.rows if tile else 0
    return Job(pair, method, rows, held, rows * row + SLACK)


def _fixed(pair: Pair, method: str, wanted: Wanted) -> int:
    shape = _shape(pair.tuned.info)
    if method == "exact":
        return exact_nbytes(shape, wanted.rank)
    return randomised_nbytes(shape, wanted.rank or min(shape)) if method else 0


def _live(info: TensorInfo) -> int:
    return LIVE * 4 * info.block_rows * info.columns


def _row_nbytes(pair: Pair) -> int:
    return pair.base.info.row_nbytes + pair.tuned.info.row_nbytes


def _square_nbytes(pair: Pair) -> int:
    return 4 * pair.tuned.info.numel


def _shape(info: TensorInfo) -> tuple[int, int]:
    return info.rows, info.columns


@dataclass
class Difference:
    """Looks at tuned - base in float32; the first one reads, later ones too unless it is held."""

    job: Job
    worker: Worker
    matrix: Tensor | None = None
    base_square: SquareSum = field(default_factory=SquareSum)

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.job.pair.tuned.info)

    def look(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows, whose heights follow from the shape alone; each until the next."""
        if self.matrix is not None:
            height = self.job.pair.tuned.info.block_rows
            for start in range(0, self.shape[0], height):
                yield start, self.matrix[start : start + height]
            return
        yield from self._read(keep=True)

    def last_look(self) -> Iterator[tuple[int, Tensor]]:
        """The same; the page cache may forget the files' bytes behind it."""
        yield from self.look() if self.matrix is not None else self._read(keep=False)

    def hold(self) -> Tensor:
        """Read it into memory: (rows, columns)."""
        import torch

        matrix = torch.empty(self.shape, dtype=torch.float32, device=self.worker.device)
        for start, rows in self._read(keep=False):
            matrix[start : start + len(rows)] = rows
        self.matrix = matrix
        return matrix

    def norms(self) -> tuple[float, float]:
        """|tuned - base| and |base|, Frobenius, in float64."""
        change = SquareSum()
        for _, rows in self._read(keep=False):
            change.add(rows)
        return math.sqrt(change.value), math.sqrt(self.base_square.value)

    def is_same(self) -> bool:
        """Whether both hold the same bytes; for tensors that are no floats."""
        base, tuned = self.job.pair.base, self.job.pair.tuned
        piece = max((self.job.staging - SLACK) // 2, 1)
        for at in range(0, base.info.nbytes, piece):
            self.worker.clear()
            size = min(piece, base.info.nbytes - at)
            left = self.worker.read(base.file, base.offset + at, size)
            if not bool((left == self.worker.read(tuned.file, tuned.offset + at, size)).all()):
                return False
        return base.info.dtype == tuned.info.dtype

    def _read(self, *, keep: bool) -> Iterator[tuple[int, Tensor]]:
        import torch

        pair, info, worker = self.job.pair, self.job.pair.tuned.info, self.worker
        wide = "F64" in (pair.base.info.dtype, info.dtype)
        dtype = torch.float64 if wide else torch.float32
        for tile in split_into_tiles(info, self.job.tile_rows):
            worker.clear()
            rows = range(tile.start, tile.stop)
            left, right = (stored.read(rows, worker, keep=keep) for stored in (pair.base, pair.tuned))
            for start in range(0, len(rows), info.block_rows):
                shape = (min(info.block_rows, len(rows) - start), info.columns)
                base = worker.scratch(0, shape, dtype).copy_(left[start : start + shape[0]])
                if not self.job.method:
                    self.base_square.add(base)
                change = worker.scratch(1, shape, dtype).copy_(right[start : start + shape[0]]).sub_(base)
                yield tile.start + start, change.float()
