"""How much of a merge is written: one total from start to end, and a rate that excludes what was resumed."""

from __future__ import annotations

import time
from collections.abc import Set

from mergeforge.core.sizes import format_size
from mergeforge.core.tensor_info import Tile
from mergeforge.planner import Plan, TensorPlan
from mergeforge.tensors.budget import resident_memory
from mergeforge.writers.encoder import chunk_ranges

WIDE = 100  # columns from which the line also says the number of tensors and the memory


class ByteCount:
    """Bytes and tensors that are written. `resumed`: the tiles that an interrupted run has written."""

    def __init__(self, plan: Plan, resumed: Set[Tile] = frozenset()) -> None:
        self._plans = {tensor_plan.info.name: tensor_plan for tensor_plan in plan.tensor_plans}
        self._resumed = resumed
        self._open_tiles = {name: len(tensor_plan.tiles) for name, tensor_plan in self._plans.items()}
        tiles = sum(_nbytes(tensor_plan, tile) for tensor_plan in plan.tensor_plans for tile in tensor_plan.tiles)
        self.total = max(plan.nbytes_written, tiles)
        self.skipped = sum(_nbytes(self._plans[tile.name], tile) for tile in resumed)
        self.done = self.total - tiles + self.skipped  # headers are written first
        self._before = self.done
        self._started = time.monotonic()

    def add(self, tile: Tile) -> None:
        self._open_tiles[tile.name] -= 1
        if tile not in self._resumed:
            self.done += _nbytes(self._plans[tile.name], tile)
        elif self.done == self._before:
            self._started = time.monotonic()  # checking what was resumed is not part of the rate

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 0.0

    @property
    def rate(self) -> float:
        """Bytes per second, of what this run has computed."""
        return (self.done - self._before) / max(time.monotonic() - self._started, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None

    def line(self, width: int) -> str:
        """The count for a line of `width` columns: percentage, bytes, rate and time left; more if there is room."""
        parts = [f"{100 * self.share:3.0f} %", _of(self.done, self.total), f"{format_size(self.rate)}/s"]
        parts.append("" if self.seconds_left is None else f"{format_seconds(self.seconds_left)} left")
        if width >= WIDE:
            tensors = sum(not count for count in self._open_tiles.values())
            parts += [f"{tensors} of {len(self._open_tiles)} tensors", f"{format_size(resident_memory())} memory"]
        return "  ".join(part for part in parts if part)


def format_seconds(seconds: float) -> str:
    """As 0:07, 12:30 or 1:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _nbytes(tensor_plan: TensorPlan, tile: Tile) -> int:
    """What a tile adds to the output files."""
    return sum(
        encoder.chunk_nbytes(*rows)
        for encoder in tensor_plan.encoders
        for rows in chunk_ranges(tile.start, tile.stop, encoder)
    )


def _of(done: int, total: int) -> str:
    """As "7.1 of 16.8 GB", or with two units where they differ."""
    number, unit = format_size(total).split()
    shown, shown_unit = format_size(done).split()
    return f"{shown} of {number} {unit}" if shown_unit == unit else f"{shown} {shown_unit} of {number} {unit}"
