"""Compute: a tile's rows through its piece's way, as every outlet writes them.

What runs and what verifies a merge both compute here, so a checked tensor went the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from mergeforge.core.tensor_info import TensorInfo, Tile, blocks, torch_dtype
from mergeforge.errors import SourceError
from mergeforge.execute.change_stats import ChangeStats, base_of, measure_change, sampled_rows, total
from mergeforge.planner import TensorPlan
from mergeforge.planner.native_sum import NativeReduction
from mergeforge.tensors.budget import Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, collect_stats
from mergeforge.tensors.merged import MergedTensor
from mergeforge.writers.encoder import TensorEncoder, chunk_ranges
from mergeforge.writers.safetensors import KEY

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]

CALM = 1e4  # a magnitude that every type holds, by far
Encoded = list[tuple[TensorEncoder, "Bytes"]]  # a tile as every outlet writes it


class EncodedTile(NamedTuple):
    """A computed tile: its bytes for every outlet, and what was measured of its change (None: nothing)."""

    tile: Tile
    encoded: Encoded
    change: ChangeStats | None = None


class _LoadedRows(NamedTuple):
    """Rows that are read: what they become, and what they were in the base where that is measured."""

    value: Rows
    before: Rows | None


def compute_tiles(
    piece: TensorPlan, tiles: tuple[Tile, ...], worker: Worker, *, allow_nonfinite: bool = False
) -> Iterator[EncodedTile]:
    """Compute tiles of one piece: yields each with its bytes as every outlet writes them.

    A piece that learns gives all its tiles, in order.
    """
    if piece.is_native:
        yield from _compute_native(piece, tiles, worker, allow_nonfinite)
        return
    facts: Stats = {}
    compute = torch_dtype(piece.compute)
    assert compute is not None
    everything = range(piece.info.rows)
    if piece.needs_stats:
        parts = [everything] if piece.fits_in_memory else [range(tile.start, tile.stop) for tile in piece.tiles]
        worker.clear()
        worker.rereads = not piece.fits_in_memory
        collect_stats(piece.tensor, StatsPass(piece.info, parts, worker, facts, compute))
        worker.rereads = False
    if piece.fits_in_memory:
        worker.reset_scratch()  # what it read to learn is still there
        staged = _load(piece, everything, worker, facts, compute)
        mark = worker.mark()
    for tile in tiles:
        if piece.fits_in_memory:
            worker.release(mark)
        else:
            worker.clear()
        if piece.is_copy:
            yield EncodedTile(tile, _copy_tile(piece, tile, worker))
            continue
        if not piece.fits_in_memory:
            staged = _load(piece, range(tile.start, tile.stop), worker, facts, compute)
        yield _compute(piece, tile, worker, staged, allow_nonfinite)


def _copy_tile(piece: TensorPlan, tile: Tile, worker: Worker) -> Encoded:
    """The tile's bytes as they are stored; they never go to a device."""
    stored = piece.tensor
    raw = worker.allocate(tile.rows * piece.info.row_nbytes)
    stored.file.read_into(raw.data, stored.offset + tile.start * piece.info.row_nbytes)  # type: ignore[attr-defined]
    return [(piece.encoders[0], raw)]


def _compute_native(
    piece: TensorPlan, tiles: tuple[Tile, ...], worker: Worker, allow_nonfinite: bool
) -> Iterator[EncodedTile]:
    """The tiles of a sum that kernels compute."""
    import numpy as np

    assert isinstance(piece.tensor, MergedTensor)
    summing, measures = NativeReduction(piece.tensor, piece.info, worker), base_of(piece.tensor) is not None
    worker.clear()
    terms = summing.collect_stats(piece.tiles)
    for tile in tiles:
        worker.clear()
        raw = worker.allocate(tile.rows * piece.info.row_nbytes)
        looked_at = [
            range(start, start + count)
            for start, stop in blocks(tile, piece.info)
            if measures and (count := sampled_rows(piece, start, stop))
        ]
        changes = np.zeros(5)
        magnitude = summing.fill(terms, tile, raw, looked_at, changes)
        (outlet,) = piece.encoders
        if outlet.overflows(magnitude) and not allow_nonfinite:
            raise _overflow_error(piece, tile, outlet, raw, magnitude)
        elements = sum(map(len, looked_at)) * piece.info.columns
        yield EncodedTile(tile, [(outlet, raw)], ChangeStats.of(elements, changes.tolist()) if measures else None)


def _load(piece: TensorPlan, rows: range, worker: Worker, facts: Stats, compute: torch.dtype) -> _LoadedRows:
    base = base_of(piece.tensor)
    value = piece.tensor.load(rows, worker, facts, compute)
    return _LoadedRows(value, base.load(rows, worker, facts, compute) if base else None)


def _compute(piece: TensorPlan, tile: Tile, worker: Worker, staged: _LoadedRows, allow_nonfinite: bool) -> EncodedTile:
    import torch

    rows, before = staged
    pens = [_ChunkBuffer(outlet, tile, worker) for outlet in piece.encoders]
    gathers = [
        _RowAssembler(height, piece.info, [pen for pen in pens if pen.outlet.chunk_rows == height])
        for height in set(piece.chunk_rows.values())
    ]
    measured: list[ChangeStats] = []
    bounds: list[Tensor | float] = []
    for start, stop in blocks(tile, piece.info):
        value = rows(start, stop)
        if before and (count := sampled_rows(piece, start, stop)):
            measured.append(measure_change(piece.info, before(start, start + count), value[:count]))
        bounds.append(_bound(value))
        for gather in gathers:
            gather.take(value, start)
    worker.wait()
    magnitude = float(torch.tensor([float(one) for one in bounds], dtype=torch.float64).amax())  # NaN carries through
    for pen in pens:
        if pen.outlet.overflows(magnitude) and not (allow_nonfinite and pen.outlet.float_dtype):
            raise _overflow_error(piece, tile, pen.outlet, pen.raw, magnitude)
    return EncodedTile(tile, [(pen.outlet, pen.raw) for pen in pens], total(measured) if before else None)


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


class _ChunkBuffer:
    """Writes a tile's strips for one outlet into the staging buffer, one after the other."""

    def __init__(self, outlet: TensorEncoder, tile: Tile, worker: Worker) -> None:
        self.outlet = outlet
        self.raw = worker.allocate(
            sum(outlet.chunk_nbytes(*strip) for strip in chunk_ranges(tile.start, tile.stop, outlet))
        )
        self.used = 0

    def write(self, rows: Tensor, start: int) -> None:
        import torch

        nbytes = self.outlet.chunk_nbytes(start, start + len(rows))
        self.outlet.encode(rows, start, torch.from_numpy(self.raw[self.used : self.used + nbytes]))
        self.used += nbytes


class _RowAssembler:
    """Hands strips of one height to the pens that take them: blocks as they are, or several put together."""

    def __init__(self, height: int, info: TensorInfo, pens: list[_ChunkBuffer]) -> None:
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


def _overflow_error(piece: TensorPlan, tile: Tile, outlet: TensorEncoder, raw: Bytes, magnitude: float) -> SourceError:
    """What does not fit the type that it would be written in; `raw`: the tile as the outlet writes it."""
    import torch

    name, about = piece.info.name, outlet.label
    if outlet.key != KEY or not (dtype := torch_dtype(outlet.float_dtype)):
        text = f"{name} would hold {magnitude:.6g}, which {about} cannot"
        return SourceError(text, hint="an input holds such values; if they are finite, gguf bf16 holds them")
    bad = ~torch.from_numpy(raw).view(dtype).isfinite()
    first = tile.start * piece.info.columns + int(bad.int().argmax())
    text = f"{name} would hold {int(bad.sum())} infinite or NaN values ({about}, first at {first})"
    hint = (
        "an input holds them, or the result does not fit the dtype (try dtype: bfloat16); --allow-nonfinite writes them"
    )
    return SourceError(text, hint=hint)
