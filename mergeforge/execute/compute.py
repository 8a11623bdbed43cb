"""Compute the tiles of a tensor as every encoder writes them.

Running a merge and verifying one both compute here, so a verified tensor took the same path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from mergeforge.core.tensor_info import TensorInfo, Tile, blocks, torch_dtype
from mergeforge.errors import SourceError
from mergeforge.execute.change_stats import ChangeStats, base_of, measure_change, sampled_rows, total_change
from mergeforge.planner import TensorPlan
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, collect_stats
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.native_files import NativeMerge
from mergeforge.tensors.worker import Worker
from mergeforge.writers.encoder import TensorEncoder, chunk_ranges
from mergeforge.writers.safetensors import KEY

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]

SAFE_MAGNITUDE = 1e4  # far below the largest number of every dtype
Encoded = list[tuple[TensorEncoder, "Bytes"]]  # a tile as each encoder writes it


class EncodedTile(NamedTuple):
    """A computed tile: its bytes for each encoder, and the statistics of its change (None: not measured)."""

    tile: Tile
    encoded: Encoded
    change: ChangeStats | None = None


class _LoadedRows(NamedTuple):
    """Loaded rows: the result, and the base if the change is measured."""

    value: Rows
    base: Rows | None


def compute_tiles(
    plan: TensorPlan, tiles: tuple[Tile, ...], worker: Worker, *, allow_nonfinite: bool = False
) -> Iterator[EncodedTile]:
    """Compute tiles of one tensor, yielding each with its bytes as every encoder writes them.

    For a tensor that needs statistics, pass all its tiles, in order. Raises SourceError for values that do not fit
    the output dtype.
    """
    worker.merges_natively, worker.counts_natively = plan.backend.name == "native", plan.backend.counts_natively
    if plan.backend.from_files:
        yield from _compute_from_files(plan, tiles, worker, allow_nonfinite)
        return
    if plan.backend.name == "copy":
        for tile in tiles:
            worker.clear()
            yield EncodedTile(tile, _copy_tile(plan, tile, worker))
        return
    stats: Stats = {}
    compute_dtype = torch_dtype(plan.backend.compute)
    assert compute_dtype is not None
    all_rows = range(plan.info.rows)
    if plan.needs_stats:
        parts = [all_rows] if plan.fits_in_memory else [range(tile.start, tile.stop) for tile in plan.tiles]
        worker.clear()
        worker.will_reread = not plan.fits_in_memory
        collect_stats(plan.tensor, StatsPass(plan.info, parts, worker, stats, compute_dtype))
        worker.will_reread = False
    if plan.fits_in_memory:
        worker.reset_scratch()  # the bytes read for the statistics are still staged
        loaded = _load(plan, all_rows, worker, stats, compute_dtype)
        mark = worker.mark()
    for tile in tiles:
        if plan.fits_in_memory:
            worker.release(mark)
        else:
            worker.clear()
        if not plan.fits_in_memory:
            loaded = _load(plan, range(tile.start, tile.stop), worker, stats, compute_dtype)
        yield _compute(plan, tile, worker, loaded, allow_nonfinite)


def _copy_tile(plan: TensorPlan, tile: Tile, worker: Worker) -> Encoded:
    """The tile's bytes as they are stored; they never go to a device."""
    stored = plan.tensor
    raw = worker.allocate(tile.rows * plan.info.row_nbytes)
    stored.file.read_into(raw.data, stored.offset + tile.start * plan.info.row_nbytes)  # type: ignore[attr-defined]
    return [(plan.encoders[0], raw)]


def _compute_from_files(
    plan: TensorPlan, tiles: tuple[Tile, ...], worker: Worker, allow_nonfinite: bool
) -> Iterator[EncodedTile]:
    """Compute tiles in the C library, from file to file."""
    import numpy as np

    assert isinstance(plan.tensor, MergedTensor)
    merge, measures = NativeMerge(plan.tensor, plan.info, worker), base_of(plan.tensor) is not None
    worker.clear()
    reduction = merge.prepare(plan.tiles)
    for tile in tiles:
        worker.clear()
        raw = worker.allocate(tile.rows * plan.info.row_nbytes)
        sampled = [
            range(start, start + count)
            for start, stop in blocks(tile, plan.info)
            if measures and (count := sampled_rows(plan, start, stop))
        ]
        changes = np.zeros(5)
        magnitude = merge.fill(reduction, tile, raw, sampled, changes)
        (encoder,) = plan.encoders
        if encoder.overflows(magnitude) and not allow_nonfinite:
            raise _overflow_error(plan, tile, encoder, raw, magnitude)
        elements = sum(map(len, sampled)) * plan.info.columns
        change = ChangeStats.from_kernel(elements, changes.tolist()) if measures else None
        yield EncodedTile(tile, [(encoder, raw)], change)


def _load(plan: TensorPlan, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> _LoadedRows:
    base = base_of(plan.tensor)
    value = plan.tensor.load(rows, worker, stats, dtype)
    return _LoadedRows(value, base.load(rows, worker, stats, dtype) if base else None)


def _compute(plan: TensorPlan, tile: Tile, worker: Worker, loaded: _LoadedRows, allow_nonfinite: bool) -> EncodedTile:
    import torch

    rows, base = loaded
    buffers = [_ChunkBuffer(encoder, tile, worker) for encoder in plan.encoders]
    assemblers = [
        _RowAssembler(height, plan.info, [buffer for buffer in buffers if buffer.encoder.chunk_rows == height])
        for height in set(plan.chunk_rows.values())
    ]
    changes: list[ChangeStats] = []
    bounds: list[Tensor | float] = []
    for start, stop in blocks(tile, plan.info):
        value = rows(start, stop)
        if base and (count := sampled_rows(plan, start, stop)):
            changes.append(measure_change(plan.info, base(start, start + count), value[:count]))
        bounds.append(_bound(value))
        for assembler in assemblers:
            assembler.add(value, start)
    worker.wait()
    magnitude = float(torch.tensor([float(bound) for bound in bounds], dtype=torch.float64).amax())  # propagates NaN
    for buffer in buffers:
        if buffer.encoder.overflows(magnitude) and not (allow_nonfinite and buffer.encoder.float_dtype):
            raise _overflow_error(plan, tile, buffer.encoder, buffer.raw, magnitude)
    encoded = [(buffer.encoder, buffer.raw) for buffer in buffers]
    return EncodedTile(tile, encoded, total_change(changes) if base else None)


def _bound(value: Tensor) -> Tensor | float:
    """An upper bound of the block's magnitudes, or NaN.

    On a CPU it is the norm if that is small, which takes a third of the time of finding the largest magnitude.
    """
    import torch

    if value.device.type == "cpu":
        flat = value.reshape(-1)
        norm = math.sqrt(float(flat.dot(flat)))
        if norm < SAFE_MAGNITUDE:
            return norm
    return torch.stack(value.aminmax()).abs().amax()


class _ChunkBuffer:
    """Encodes the chunks of a tile for one encoder into the staging buffer, one after the other."""

    def __init__(self, encoder: TensorEncoder, tile: Tile, worker: Worker) -> None:
        self.encoder = encoder
        self.raw = worker.allocate(
            sum(encoder.chunk_nbytes(*chunk) for chunk in chunk_ranges(tile.start, tile.stop, encoder))
        )
        self.used = 0

    def write(self, rows: Tensor, start: int) -> None:
        import torch

        nbytes = self.encoder.chunk_nbytes(start, start + len(rows))
        self.encoder.encode(rows, start, torch.from_numpy(self.raw[self.used : self.used + nbytes]))
        self.used += nbytes


class _RowAssembler:
    """Passes chunks of one height to the buffers that take them: blocks as they are, or several put together."""

    def __init__(self, height: int, info: TensorInfo, buffers: list[_ChunkBuffer]) -> None:
        self.height = height
        self.info = info
        self.buffers = buffers
        self.assembled: Tensor | None = None

    def add(self, value: Tensor, start: int) -> None:
        """Take the next block of the tile."""
        if self.height == self.info.block_rows:
            self._write(value, start)
            return
        first = start - start % self.height
        last = min(first + self.height, self.info.rows)
        if self.assembled is None:
            self.assembled = value.new_empty(self.height, value.shape[1])
        self.assembled[start - first : start - first + len(value)].copy_(value)
        if start + len(value) == last:
            self._write(self.assembled[: last - first], first)

    def _write(self, rows: Tensor, start: int) -> None:
        for buffer in self.buffers:
            buffer.write(rows, start)


def _overflow_error(plan: TensorPlan, tile: Tile, encoder: TensorEncoder, raw: Bytes, magnitude: float) -> SourceError:
    """An error about values that do not fit the encoder's type; `raw`: the encoded tile."""
    import torch

    name, label = plan.info.name, encoder.label
    if encoder.key != KEY or not (dtype := torch_dtype(encoder.float_dtype)):
        text = f"{name} would hold {magnitude:.6g}, which {label} cannot represent"
        return SourceError(text, hint="an input holds such values; if they are finite, gguf type bf16 can hold them")
    nonfinite = ~torch.from_numpy(raw).view(dtype).isfinite()
    first = tile.start * plan.info.columns + int(nonfinite.int().argmax())
    text = f"{name} would hold {int(nonfinite.sum())} infinite or NaN values ({label}, first at element {first})"
    hint = (
        "an input holds them, or the result does not fit the dtype (try dtype: bfloat16); --allow-nonfinite writes them"
    )
    return SourceError(text, hint=hint)
