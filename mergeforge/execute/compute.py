"""Compute: a tile's rows through its piece's way, as every outlet writes them.

What runs and what verifies a merge both compute here, so a checked tensor went the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from mergeforge.core.tensor_info import TensorInfo, Tile, blocks, torch_dtype
from mergeforge.errors import SourceError
from mergeforge.execute.change_stats import Measured, base_of, looks_at, measure, total
from mergeforge.planner import Piece
from mergeforge.planner.native_sum import Summing
from mergeforge.tensors.budget import Worker
from mergeforge.tensors.lazy import Facts, Rows, Scan, learn
from mergeforge.tensors.merged import Merged
from mergeforge.writers.encoder import Outlet, strips
from mergeforge.writers.safetensors import KEY

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]

CALM = 1e4  # a magnitude that every type holds, by far
Encoded = list[tuple[Outlet, "Bytes"]]  # a tile as every outlet writes it


class Carried(NamedTuple):
    """A computed tile: its bytes for every outlet, and what was measured of its change (None: nothing)."""

    tile: Tile
    encoded: Encoded
    measured: Measured | None = None


class _Staged(NamedTuple):
    """Rows that are read: what they become, and what they were in the base where that is measured."""

    value: Rows
    before: Rows | None


def carry(piece: Piece, tiles: tuple[Tile, ...], worker: Worker, *, allow_nonfinite: bool = False) -> Iterator[Carried]:
    """Compute tiles of one piece: yields each with its bytes as every outlet writes them.

    A piece that learns gives all its tiles, in order.
    """
    if piece.summed:
        yield from _carry_sum(piece, tiles, worker, allow_nonfinite)
        return
    facts: Facts = {}
    compute = torch_dtype(piece.compute)
    assert compute is not None
    everything = range(piece.info.rows)
    if piece.learns:
        parts = [everything] if piece.whole else [range(tile.start, tile.stop) for tile in piece.tiles]
        worker.clear()
        worker.rereads = not piece.whole
        learn(piece.way, Scan(piece.info, parts, worker, facts, compute))
        worker.rereads = False
    if piece.whole:
        worker.restart()  # what it read to learn is still there
        staged = _stage(piece, everything, worker, facts, compute)
        mark = worker.mark()
    for tile in tiles:
        if piece.whole:
            worker.release(mark)
        else:
            worker.clear()
        if piece.copied:
            yield Carried(tile, _copy(piece, tile, worker))
            continue
        if not piece.whole:
            staged = _stage(piece, range(tile.start, tile.stop), worker, facts, compute)
        yield _compute(piece, tile, worker, staged, allow_nonfinite)


def _copy(piece: Piece, tile: Tile, worker: Worker) -> Encoded:
    """The tile's bytes as they are stored; they never go to a device."""
    stored = piece.way
    raw = worker.take(tile.rows * piece.info.row_nbytes)
    stored.file.read_into(raw.data, stored.offset + tile.start * piece.info.row_nbytes)  # type: ignore[attr-defined]
    return [(piece.outlets[0], raw)]


def _carry_sum(piece: Piece, tiles: tuple[Tile, ...], worker: Worker, allow_nonfinite: bool) -> Iterator[Carried]:
    """The tiles of a sum that kernels compute."""
    import numpy as np

    assert isinstance(piece.way, Merged)
    summing, measures = Summing(piece.way, piece.info, worker), base_of(piece.way) is not None
    worker.clear()
    terms = summing.learn(piece.tiles)
    for tile in tiles:
        worker.clear()
        raw = worker.take(tile.rows * piece.info.row_nbytes)
        looked_at = [
            range(start, start + count)
            for start, stop in blocks(tile, piece.info)
            if measures and (count := looks_at(piece, start, stop))
        ]
        changes = np.zeros(5)
        magnitude = summing.fill(terms, tile, raw, looked_at, changes)
        (outlet,) = piece.outlets
        if outlet.refuses(magnitude) and not allow_nonfinite:
            raise _unfit(piece, tile, outlet, raw, magnitude)
        elements = sum(map(len, looked_at)) * piece.info.columns
        yield Carried(tile, [(outlet, raw)], Measured.of(elements, changes.tolist()) if measures else None)


def _stage(piece: Piece, rows: range, worker: Worker, facts: Facts, compute: torch.dtype) -> _Staged:
    base = base_of(piece.way)
    value = piece.way.stage(rows, worker, facts, compute)
    return _Staged(value, base.stage(rows, worker, facts, compute) if base else None)


def _compute(piece: Piece, tile: Tile, worker: Worker, staged: _Staged, allow_nonfinite: bool) -> Carried:
    import torch

    rows, before = staged
    pens = [_Pen(outlet, tile, worker) for outlet in piece.outlets]
    gathers = [
        _Gather(height, piece.info, [pen for pen in pens if pen.outlet.strip_rows == height])
        for height in set(piece.strip_rows.values())
    ]
    measured: list[Measured] = []
    bounds: list[Tensor | float] = []
    for start, stop in blocks(tile, piece.info):
        value = rows(start, stop)
        if before and (count := looks_at(piece, start, stop)):
            measured.append(measure(piece.info, before(start, start + count), value[:count]))
        bounds.append(_bound(value))
        for gather in gathers:
            gather.take(value, start)
    worker.wait()
    magnitude = float(torch.tensor([float(one) for one in bounds], dtype=torch.float64).amax())  # NaN carries through
    for pen in pens:
        if pen.outlet.refuses(magnitude) and not (allow_nonfinite and pen.outlet.plain):
            raise _unfit(piece, tile, pen.outlet, pen.raw, magnitude)
    return Carried(tile, [(pen.outlet, pen.raw) for pen in pens], total(measured) if before else None)


def _bound(value: Tensor) -> Tensor | float:
    """A number as large as any of the block, or NaN.

    On a CPU the norm where it is small: that takes a third of the time of looking for the largest.
    """
    import torch

    if value.device.type == "cpu":
        flat = value.reshape(-1)
        norm = math.sqrt(float(flat.dot(flat)))
        if norm < CALM:
            return norm
    return torch.stack(value.aminmax()).abs().amax()


class _Pen:
    """Writes a tile's strips for one outlet into the staging buffer, one after the other."""

    def __init__(self, outlet: Outlet, tile: Tile, worker: Worker) -> None:
        self.outlet = outlet
        self.raw = worker.take(sum(outlet.nbytes(*strip) for strip in strips(tile.start, tile.stop, outlet)))
        self.used = 0

    def write(self, rows: Tensor, start: int) -> None:
        import torch

        nbytes = self.outlet.nbytes(start, start + len(rows))
        self.outlet.encode(rows, start, torch.from_numpy(self.raw[self.used : self.used + nbytes]))
        self.used += nbytes


class _Gather:
    """Hands strips of one height to the pens that take them: blocks as they are, or several put together."""

    def __init__(self, height: int, info: TensorInfo, pens: list[_Pen]) -> None:
        self.height = height
        self.info = info
        self.pens = pens
        self.gathered: Tensor | None = None

    def take(self, value: Tensor, start: int) -> None:
        """The next block of the tile."""
        if self.height == self.info.block_rows:
            self._write(value, start)
            return
        first = start - start % self.height
        last = min(first + self.height, self.info.rows)
        if self.gathered is None:
            self.gathered = value.new_empty(self.height, value.shape[1])
        self.gathered[start - first : start - first + len(value)].copy_(value)
        if start + len(value) == last:
            self._write(self.gathered[: last - first], first)

    def _write(self, rows: Tensor, start: int) -> None:
        for pen in self.pens:
            pen.write(rows, start)


def _unfit(piece: Piece, tile: Tile, outlet: Outlet, raw: Bytes, magnitude: float) -> SourceError:
    """What does not fit the type that it would be written in; `raw`: the tile as the outlet writes it."""
    import torch

    name, about = piece.info.name, outlet.about
    if outlet.key != KEY or not (dtype := torch_dtype(outlet.plain)):
        text = f"{name} would hold {magnitude:.6g}, which {about} cannot"
        return SourceError(text, hint="an input holds such values; if they are finite, gguf bf16 holds them")
    bad = ~torch.from_numpy(raw).view(dtype).isfinite()
    first = tile.start * piece.info.columns + int(bad.int().argmax())
    text = f"{name} would hold {int(bad.sum())} infinite or NaN values ({about}, first at {first})"
    hint = (
        "an input holds them, or the result does not fit the dtype (try dtype: bfloat16); --allow-nonfinite writes them"
    )
    return SourceError(text, hint=hint)
