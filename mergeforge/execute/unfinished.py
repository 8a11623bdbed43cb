"""What an interrupted run has left in its folder, read without locking or changing anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergeforge.core.tensor_info import Tile
from mergeforge.errors import MALFORMED_ERRORS
from mergeforge.execute.journal import read_records
from mergeforge.planner import WORK, Plan

Rows = tuple[int, int]


@dataclass(frozen=True)
class UnfinishedRun:
    """The merge of an interrupted run: its fingerprint, its method, and the rows that are written, by tensor."""

    fingerprint: str
    method: str
    rows: Mapping[str, tuple[Rows, ...]]

    def holds(self, tile: Tile) -> bool:
        """Whether every row of a tile is written, maybe as parts of other tiles."""
        start = tile.start
        for first, stop in self.rows.get(tile.name, ()):
            if first <= start < stop:
                start = stop
        return start >= tile.stop


def read_unfinished(out: Path) -> UnfinishedRun | None:
    """The interrupted run in an output folder; None if there is none."""
    try:
        first, *records = read_records(out / WORK)
        tiles = [Tile(*record["tile"]) for record in records if "tile" in record]
        return UnfinishedRun(first["merge"], str(first.get("summary", "")), _rows(tiles))
    except MALFORMED_ERRORS:
        return None


def finished_tiles(plan: Plan) -> frozenset[Tile]:
    """The tiles of a plan that an interrupted run of it has written."""
    run = read_unfinished(plan.out)
    if run is None or run.fingerprint != plan.fingerprint:
        return frozenset()
    tiles = (tile for tensor_plan in plan.tensor_plans for tile in tensor_plan.tiles)
    return frozenset(tile for tile in tiles if run.holds(tile))


def _rows(tiles: Iterable[Tile]) -> dict[str, tuple[Rows, ...]]:
    rows: dict[str, list[Rows]] = {}
    for tile in tiles:
        rows.setdefault(tile.name, []).append((tile.start, tile.stop))
    return {name: tuple(sorted(ranges)) for name, ranges in rows.items()}
