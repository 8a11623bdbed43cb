"""Tiles: every output tensor split into rows that provably fit into the memory given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mergeforge.core.sizes import format_size
from mergeforge.core.tensor_info import TILE_NBYTES, TensorInfo, Tile, split_into_tiles
from mergeforge.errors import BudgetError
from mergeforge.planner.backend import Backend, choose_backend
from mergeforge.tensors.budget import Budget
from mergeforge.tensors.lazy import LazyTensor, any_needs_stats
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.native_files import staging_nbytes
from mergeforge.tensors.worker import ALIGNMENT
from mergeforge.writers.encoder import TensorEncoder, chunk_alignment

FROM_FILES_NBYTES = 4 << 20  # of a tile whose inputs are not staged
SLACK = 64 * ALIGNMENT  # bytes of a staging buffer that aligning its allocations may take


@dataclass(frozen=True)
class TensorPlan:
    """The work on one output tensor.

    info: name, shape and dtype as written. tensor: how it is computed. encoders: what writes it. backend: what
    computes it. needs_stats: statistics of the whole tensor come first, so one worker takes all its tiles, in order.
    fits_in_memory: all rows of its inputs are staged at once, and read once for all tiles. staging_nbytes,
    scratch_nbytes: the memory of one worker.
    """

    info: TensorInfo
    tensor: LazyTensor
    encoders: tuple[TensorEncoder, ...]
    backend: Backend
    needs_stats: bool
    fits_in_memory: bool
    tiles: tuple[Tile, ...]
    staging_nbytes: int
    scratch_nbytes: int

    @property
    def chunk_rows(self) -> Mapping[str, int]:
        """Rows of a chunk for each encoder, by its key."""
        return {encoder.key: encoder.chunk_rows for encoder in self.encoders}


def plan_tiles(
    tensors: Mapping[str, LazyTensor],
    infos: Mapping[str, TensorInfo],
    encoders: Mapping[str, Sequence[TensorEncoder]],
    budget: Budget,
) -> tuple[list[TensorPlan], Budget]:
    """A TensorPlan for every tensor that has encoders, and the budget with its number of workers decided.

    Raises BudgetError, with the memory that it would take, when a tensor does not fit.
    """
    infos = {name: infos[name] for name in encoders}
    backends = {
        name: choose_backend(tensors[name], info, encoders[name], budget.device) for name, info in infos.items()
    }
    scratch = max(
        (_scratch_nbytes(tensors[name], info, encoders[name], backends[name]) for name, info in infos.items()),
        default=0,
    )
    for threads in [budget.threads] if budget.threads else range(budget.max_threads, 0, -1):
        candidate = replace(budget, threads=threads)
        # a worker keeps its largest staging buffer and its scratch blocks
        staging = (candidate.per_worker - scratch) // candidate.buffer_copies
        plans = [
            plan_tensor(tensors[name], info, tuple(encoders[name]), staging, backends[name])
            for name, info in infos.items()
        ]
        if all(plan.staging_nbytes <= staging for plan in plans):
            return _in_running_order(plans), candidate
    largest = max(plans, key=lambda plan: plan.staging_nbytes)
    needed = largest.staging_nbytes * budget.buffer_copies + scratch
    text = (
        f"{largest.info.name} needs {format_size(needed)} for one worker, which has {format_size(candidate.per_worker)}"
    )
    raise BudgetError(text, hint=f"--memory {-(-needed >> 20)}MiB --threads 1, or more")


def peak_memory(tensor_plans: Iterable[TensorPlan], budget: Budget) -> int:
    """Working memory in bytes of all workers at their largest tensors."""
    tensor_plans = list(tensor_plans)
    staging = max((plan.staging_nbytes for plan in tensor_plans), default=0)
    scratch = max((plan.scratch_nbytes for plan in tensor_plans), default=0)
    return budget.threads * (staging * budget.buffer_copies + scratch)


def plan_tensor(
    tensor: LazyTensor, info: TensorInfo, encoders: tuple[TensorEncoder, ...], free: int, backend: Backend
) -> TensorPlan:
    """`free`: bytes of staging memory that one worker has."""
    if backend.name == "copy":
        return _plan_copy(tensor, info, encoders, backend, free)
    if backend.from_files:
        return _plan_from_files(tensor, info, encoders, backend, free)
    cost = tensor.memory_cost
    output_row = sum(encoder.row_nbytes for encoder in encoders)
    alignment = chunk_alignment(info.block_rows, encoders, info.rows)
    slack = SLACK + ALIGNMENT * len(encoders)
    free -= cost.fixed_nbytes + slack
    needs_stats = any_needs_stats(tensor)
    beside_inputs = free - info.rows * cost.row_nbytes
    fits = needs_stats and beside_inputs >= min(alignment, info.rows) * output_row
    row, tile_free = (output_row, beside_inputs) if fits else (cost.row_nbytes + output_row, free)
    tiles = tuple(split_into_tiles(info, max(min(tile_free, TILE_NBYTES) // max(row, 1), 1), alignment))
    tile_rows = max((tile.rows for tile in tiles), default=0)
    staging = (info.rows * cost.row_nbytes if fits else 0) + tile_rows * row + cost.fixed_nbytes + slack
    scratch = _scratch_nbytes(tensor, info, encoders, backend)
    return TensorPlan(info, tensor, encoders, backend, needs_stats, fits, tiles, staging, scratch)


def _scratch_nbytes(tensor: LazyTensor, info: TensorInfo, encoders: Sequence[TensorEncoder], backend: Backend) -> int:
    """Bytes of the blocks that exist at once while a tensor is computed, and of what encoding takes."""
    if not backend.needs_torch:
        return 0
    size = 8 if backend.compute == "F64" else 4
    block = info.block_rows * info.columns * size
    assembled_rows = sum(height for height in {encoder.chunk_rows for encoder in encoders} if height != info.block_rows)
    encoding = max(encoder.scratch_nbytes for encoder in encoders)
    # two blocks more: one for the base that a change is measured against, one for checking the result
    return (tensor.memory_cost.scratch_blocks + 2) * block + assembled_rows * info.columns * size + encoding


def _plan_copy(
    tensor: LazyTensor, info: TensorInfo, encoders: tuple[TensorEncoder, ...], backend: Backend, free: int
) -> TensorPlan:
    rows = min(TILE_NBYTES, free - SLACK) // max(info.row_nbytes, 1)
    tiles = tuple(split_into_tiles(info, max(rows, 1)))
    staging = max((tile.rows for tile in tiles), default=0) * info.row_nbytes + SLACK
    return TensorPlan(info, tensor, encoders, backend, False, False, tiles, staging, 0)


def _plan_from_files(
    tensor: LazyTensor, info: TensorInfo, encoders: tuple[TensorEncoder, ...], backend: Backend, free: int
) -> TensorPlan:
    assert isinstance(tensor, MergedTensor)
    fixed = SLACK + staging_nbytes(tensor)
    rows = min(FROM_FILES_NBYTES, free - fixed) // max(info.row_nbytes, 1)
    tiles = tuple(split_into_tiles(info, max(rows, 1)))
    staging = max((tile.rows for tile in tiles), default=0) * info.row_nbytes + fixed
    return TensorPlan(info, tensor, encoders, backend, any_needs_stats(tensor), False, tiles, staging, 0)


def _in_running_order(plans: list[TensorPlan]) -> list[TensorPlan]:
    """In the order of the files, except that tensors that keep one worker busy for long come first."""
    long = {id(plan) for plan in plans if plan.needs_stats and not plan.fits_in_memory}
    longest_first = sorted((plan for plan in plans if id(plan) in long), key=lambda plan: -plan.info.nbytes)
    return longest_first + [plan for plan in plans if id(plan) not in long]
