"""Cutting tensors into tiles that provably fit into the memory given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mergeforge.core.sizes import show_size
from mergeforge.core.tensor_info import TensorInfo, Tile, cut
from mergeforge.errors import BudgetError
from mergeforge.planner.native_sum import is_summed, summing_nbytes
from mergeforge.tensors.budget import ALIGNMENT, Budget
from mergeforge.tensors.lazy import Way, any_learns
from mergeforge.tensors.stored import Stored
from mergeforge.writers.encoder import Outlet, common_strip
from mergeforge.writers.safetensors import CheckpointOutlet

TILE_NBYTES = 16 << 20  # as fast as any larger tile, and two of them leave the cache bounded
SUM_NBYTES = 4 << 20  # of a tile of which nothing else is staged
SLACK = 64 * ALIGNMENT  # of a staging buffer, for the alignment of its pieces


@dataclass(frozen=True)
class Piece:
    """One output tensor, cut: `info` as written, `way` as computed, in `compute` ("F32" or "F64").

    `outlets`: what takes it. `copied`: bytes go through unchanged. `summed`: kernels add it up (summing.py).
    `learns`: facts about the whole tensor come first, so its tiles belong to one worker, in order. `whole`: there is
    room for all of its inputs at once, which are then read once for all tiles. `staging` and `live`: bytes that one
    worker needs.
    """

    info: TensorInfo
    way: Way
    outlets: tuple[Outlet, ...]
    compute: str
    copied: bool
    summed: bool
    learns: bool
    whole: bool
    tiles: tuple[Tile, ...]
    staging: int
    live: int

    @property
    def strip_rows(self) -> Mapping[str, int]:
        """Rows of a strip of each outlet, by its key."""
        return {outlet.key: outlet.strip_rows for outlet in self.outlets}


def cut_all(
    ways: Mapping[str, Way],
    infos: Mapping[str, TensorInfo],
    outlets: Mapping[str, Sequence[Outlet]],
    budget: Budget,
) -> tuple[list[Piece], Budget]:
    """Pieces for every tensor, and the budget with its number of workers decided.

    Raises BudgetError, with what it would take, when a tensor does not fit.
    """
    explicit = budget.threads
    live = max((_live(ways[name], info, outlets[name], budget.device) for name, info in infos.items()), default=0)
    for threads in [explicit] if explicit else range(budget.most_threads, 0, -1):
        tried = replace(budget, threads=threads)
        room = (tried.share - live) // tried.copies  # a worker keeps its largest staging buffer and its scratch blocks
        pieces = [_piece(ways[name], info, tuple(outlets[name]), room, budget.device) for name, info in infos.items()]
        if all(piece.staging <= room for piece in pieces):
            return _ordered(pieces, tried), tried
    worst = max(pieces, key=lambda piece: piece.staging)
    needs = worst.staging * budget.copies + live
    hint = f"--memory {-(-needs >> 20)}MiB --threads 1, or more"
    given = f"{show_size(tried.share)} given"
    raise BudgetError(f"{worst.info.name} needs {show_size(needs)} for one worker, {given}", hint=hint)


def peak(pieces: Iterable[Piece], budget: Budget) -> int:
    """Working memory of all workers at their largest pieces."""
    pieces = list(pieces)
    staging = max((piece.staging for piece in pieces), default=0)
    return budget.threads * (staging * budget.copies + max((piece.live for piece in pieces), default=0))


def _piece(way: Way, info: TensorInfo, outlets: tuple[Outlet, ...], room: int, device: str) -> Piece:
    if _is_copied(way, info, outlets):
        return _copied(way, info, outlets, room)
    if is_summed(way, info, outlets, device):
        return _summed(way, info, outlets, room)
    need = way.need
    written = sum(outlet.row_nbytes for outlet in outlets)
    strip = common_strip(info.block_rows, outlets, info.rows)
    slack = SLACK + ALIGNMENT * len(outlets)
    room -= need.fixed + slack
    learns = any_learns(way)
    beside = room - info.rows * need.row  # all rows of the inputs
    whole = learns and beside >= min(strip, info.rows) * written
    row, free = (written, beside) if whole else (need.row + written, room)
    tiles = tuple(cut(info, max(min(free, TILE_NBYTES) // max(row, 1), 1), strip))
    highest = max((tile.rows for tile in tiles), default=0)
    staging = (info.rows * need.row if whole else 0) + highest * row + need.fixed + slack
    compute, live = _compute(way, info), _live(way, info, outlets, device)
    return Piece(info, way, outlets, compute, False, False, learns, whole, tiles, staging, live)


def _live(way: Way, info: TensorInfo, outlets: Sequence[Outlet], device: str) -> int:
    """Bytes of the blocks that exist at once while a tensor is computed, and of what encoding takes."""
    if _is_copied(way, info, outlets) or is_summed(way, info, outlets, device):
        return 0
    size = 8 if _compute(way, info) == "F64" else 4
    block = info.block_rows * info.columns * size
    gathered = sum(height for height in {one.strip_rows for one in outlets} if height != info.block_rows)
    encoding = max(outlet.live for outlet in outlets)
    return (way.need.live + 2) * block + gathered * info.columns * size + encoding  # and what checking it takes


def _compute(way: Way, info: TensorInfo) -> str:
    return "F64" if "F64" in (info.dtype, *_stored_dtypes(way)) else "F32"


def _is_copied(way: Way, info: TensorInfo, outlets: Sequence[Outlet]) -> bool:
    to_checkpoint = len(outlets) == 1 and isinstance(outlets[0], CheckpointOutlet)
    return to_checkpoint and isinstance(way, Stored) and way.info.dtype == info.dtype


def _copied(way: Way, info: TensorInfo, outlets: tuple[Outlet, ...], room: int) -> Piece:
    rows = min(TILE_NBYTES, room - SLACK) // max(info.row_nbytes, 1)
    tiles = tuple(cut(info, max(rows, 1)))
    highest = max((tile.rows for tile in tiles), default=0)
    return Piece(info, way, outlets, "F32", True, False, False, False, tiles, highest * info.row_nbytes + SLACK, 0)


def _summed(way: Way, info: TensorInfo, outlets: tuple[Outlet, ...], room: int) -> Piece:
    beside = SLACK + summing_nbytes(way, info)
    tiles = tuple(cut(info, max(min(SUM_NBYTES, room - beside) // max(info.row_nbytes, 1), 1)))
    staging = max((tile.rows for tile in tiles), default=0) * info.row_nbytes + beside
    return Piece(info, way, outlets, "F32", False, True, any_learns(way), False, tiles, staging, 0)


def _stored_dtypes(way: Way) -> set[str]:
    return {way.info.dtype}.union(*(_stored_dtypes(part) for part in way.parts))


def _ordered(pieces: list[Piece], budget: Budget) -> list[Piece]:
    """In the order of the files, but tensors that keep one worker busy for long come first."""
    long = {id(piece) for piece in pieces if piece.learns and not piece.whole}
    longest = sorted((piece for piece in pieces if id(piece) in long), key=lambda piece: -piece.info.nbytes)
    return longest + [piece for piece in pieces if id(piece) not in long]
