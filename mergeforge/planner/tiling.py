"""Cutting tensors into tiles that provably fit into the memory given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mergeforge.core.sizes import show_size
from mergeforge.core.tensor_info import TensorInfo, Tile, split_into_tiles
from mergeforge.errors import BudgetError
from mergeforge.planner.native_sum import is_native, native_staging_nbytes
from mergeforge.tensors.budget import ALIGNMENT, Budget
from mergeforge.tensors.lazy import LazyTensor, any_needs_stats
from mergeforge.tensors.stored import StoredTensor
from mergeforge.writers.encoder import TensorEncoder, chunk_alignment
from mergeforge.writers.safetensors import SafetensorsEncoder

TILE_NBYTES = 16 << 20  # as fast as any larger tile, and two of them leave the cache bounded
SUM_NBYTES = 4 << 20  # of a tile of which nothing else is staged
SLACK = 64 * ALIGNMENT  # of a staging buffer, for the alignment of its pieces


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor, cut: `info` as written, `way` as computed, in `compute` ("F32" or "F64").

    `outlets`: what takes it. `copied`: bytes go through unchanged. `summed`: kernels add it up (summing.py).
    `learns`: facts about the whole tensor come first, so its tiles belong to one worker, in order. `whole`: there is
    room for all of its inputs at once, which are then read once for all tiles. `staging` and `live`: bytes that one
    worker needs.
    """

    info: TensorInfo
    tensor: LazyTensor
    encoders: tuple[TensorEncoder, ...]
    compute: str
    is_copy: bool
    is_native: bool
    needs_stats: bool
    fits_in_memory: bool
    tiles: tuple[Tile, ...]
    staging_nbytes: int
    scratch_nbytes: int

    @property
    def chunk_rows(self) -> Mapping[str, int]:
        """Rows of a strip of each outlet, by its key."""
        return {outlet.key: outlet.chunk_rows for outlet in self.encoders}


def plan_tiles(
    ways: Mapping[str, LazyTensor],
    infos: Mapping[str, TensorInfo],
    outlets: Mapping[str, Sequence[TensorEncoder]],
    budget: Budget,
) -> tuple[list[TensorPlan], Budget]:
    """Pieces for every tensor, and the budget with its number of workers decided.

    Raises BudgetError, with what it would take, when a tensor does not fit.
    """
    explicit = budget.threads
    live = max((_live(ways[name], info, outlets[name], budget.device) for name, info in infos.items()), default=0)
    for threads in [explicit] if explicit else range(budget.max_threads, 0, -1):
        tried = replace(budget, threads=threads)
        room = (
            tried.per_worker - live
        ) // tried.buffer_copies  # a worker keeps its largest staging buffer and its scratch blocks
        pieces = [_piece(ways[name], info, tuple(outlets[name]), room, budget.device) for name, info in infos.items()]
        if all(piece.staging_nbytes <= room for piece in pieces):
            return _ordered(pieces, tried), tried
    worst = max(pieces, key=lambda piece: piece.staging_nbytes)
    needs = worst.staging_nbytes * budget.buffer_copies + live
    hint = f"--memory {-(-needs >> 20)}MiB --threads 1, or more"
    given = f"{show_size(tried.per_worker)} given"
    raise BudgetError(f"{worst.info.name} needs {show_size(needs)} for one worker, {given}", hint=hint)


def peak_memory(pieces: Iterable[TensorPlan], budget: Budget) -> int:
    """Working memory of all workers at their largest pieces."""
    pieces = list(pieces)
    staging = max((piece.staging_nbytes for piece in pieces), default=0)
    return budget.threads * (
        staging * budget.buffer_copies + max((piece.scratch_nbytes for piece in pieces), default=0)
    )


def _piece(way: LazyTensor, info: TensorInfo, outlets: tuple[TensorEncoder, ...], room: int, device: str) -> TensorPlan:
    if _is_copied(way, info, outlets):
        return _copied(way, info, outlets, room)
    if is_native(way, info, outlets, device):
        return _summed(way, info, outlets, room)
    need = way.memory_cost
    written = sum(outlet.row_nbytes for outlet in outlets)
    strip = chunk_alignment(info.block_rows, outlets, info.rows)
    slack = SLACK + ALIGNMENT * len(outlets)
    room -= need.fixed_nbytes + slack
    learns = any_needs_stats(way)
    beside = room - info.rows * need.row_nbytes  # all rows of the inputs
    whole = learns and beside >= min(strip, info.rows) * written
    row, free = (written, beside) if whole else (need.row_nbytes + written, room)
    tiles = tuple(split_into_tiles(info, max(min(free, TILE_NBYTES) // max(row, 1), 1), strip))
    highest = max((tile.rows for tile in tiles), default=0)
    staging = (info.rows * need.row_nbytes if whole else 0) + highest * row + need.fixed_nbytes + slack
    compute, live = _compute(way, info), _live(way, info, outlets, device)
    return TensorPlan(info, way, outlets, compute, False, False, learns, whole, tiles, staging, live)


def _live(way: LazyTensor, info: TensorInfo, outlets: Sequence[TensorEncoder], device: str) -> int:
    """Bytes of the blocks that exist at once while a tensor is computed, and of what encoding takes."""
    if _is_copied(way, info, outlets) or is_native(way, info, outlets, device):
        return 0
    size = 8 if _compute(way, info) == "F64" else 4
    block = info.block_rows * info.columns * size
    gathered = sum(height for height in {one.chunk_rows for one in outlets} if height != info.block_rows)
    encoding = max(outlet.scratch_nbytes for outlet in outlets)
    return (
        (way.memory_cost.scratch_blocks + 2) * block + gathered * info.columns * size + encoding
    )  # and what checking it takes


def _compute(way: LazyTensor, info: TensorInfo) -> str:
    return "F64" if "F64" in (info.dtype, *_stored_dtypes(way)) else "F32"


def _is_copied(way: LazyTensor, info: TensorInfo, outlets: Sequence[TensorEncoder]) -> bool:
    to_checkpoint = len(outlets) == 1 and isinstance(outlets[0], SafetensorsEncoder)
    return to_checkpoint and isinstance(way, StoredTensor) and way.info.dtype == info.dtype


def _copied(way: LazyTensor, info: TensorInfo, outlets: tuple[TensorEncoder, ...], room: int) -> TensorPlan:
    rows = min(TILE_NBYTES, room - SLACK) // max(info.row_nbytes, 1)
    tiles = tuple(split_into_tiles(info, max(rows, 1)))
    highest = max((tile.rows for tile in tiles), default=0)
    return TensorPlan(info, way, outlets, "F32", True, False, False, False, tiles, highest * info.row_nbytes + SLACK, 0)


def _summed(way: LazyTensor, info: TensorInfo, outlets: tuple[TensorEncoder, ...], room: int) -> TensorPlan:
    beside = SLACK + native_staging_nbytes(way, info)
    tiles = tuple(split_into_tiles(info, max(min(SUM_NBYTES, room - beside) // max(info.row_nbytes, 1), 1)))
    staging = max((tile.rows for tile in tiles), default=0) * info.row_nbytes + beside
    return TensorPlan(info, way, outlets, "F32", False, True, any_needs_stats(way), False, tiles, staging, 0)


def _stored_dtypes(way: LazyTensor) -> set[str]:
    return {way.info.dtype}.union(*(_stored_dtypes(part) for part in way.inputs))


def _ordered(pieces: list[TensorPlan], budget: Budget) -> list[TensorPlan]:
    """In the order of the files, but tensors that keep one worker busy for long come first."""
    long = {id(piece) for piece in pieces if piece.needs_stats and not piece.fits_in_memory}
    longest = sorted((piece for piece in pieces if id(piece) in long), key=lambda piece: -piece.info.nbytes)
    return longest + [piece for piece in pieces if id(piece) not in long]
