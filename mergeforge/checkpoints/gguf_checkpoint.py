"""A tensor out of a GGUF file, under its Hugging Face name: dequantised row by row, in the stored order again.

The same places that say where a stored row goes in a GGUF file say where it comes from. The values
are those of the gguf package's dequantisers (gguf-py/gguf/quants.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, listing
from mergeforge.gguf.architectures import TensorTarget, build_spec
from mergeforge.gguf.reader import GGUFTensorInfo, read_gguf
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

LIVE = 6  # blocks that dequantising takes: the bytes, integer and float temporaries, the result


@dataclass(frozen=True, eq=False)
class DequantizedGGUFTensor:
    """Rows of one stored tensor, from the GGUF tensors that hold them (two for fused gate and up)."""

    info: TensorInfo
    held: tuple[tuple[TensorTarget, GGUFTensorInfo], ...]

    inputs: tuple[LazyTensor, ...] = ()
    needs_stats: bool = False

    @property
    def file(self) -> InputFile:
        return self.held[0][1].file

    @property
    def memory_cost(self) -> MemoryCost:
        row = max(one.row_nbytes(self.info.columns) for _, one in self.held)
        return MemoryCost(row_nbytes=row, fixed_nbytes=ALIGNMENT * 64, scratch_blocks=LIVE)

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        every = self._units()
        staged = [self._staged(at, every[at], rows, worker) for at in range(len(self.held))]
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            into = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            for at, (units, raw) in enumerate(staged):
                self._fill(into, at, every[at][start:stop], units, raw)
            return into

        return block

    def _staged(self, at: int, every: np.ndarray, rows: range, worker: Worker) -> tuple[np.ndarray, np.ndarray]:
        """The units that the rows want of GGUF tensor `at`, ascending, and their bytes."""
        import numpy as np

        held = self.held[at][1]
        size = held.row_nbytes(self.info.columns)
        units = np.sort(every[rows.start : rows.stop])
        units = units[np.searchsorted(units, 0) :]

        def read() -> np.ndarray:
            raw = worker.allocate(len(units) * size)
            filled = 0
            for first, count in _runs(units):
                held.file.read_into(raw[filled : filled + count * size].data, held.offset + first * size)
                filled += count * size
            return raw

        raw = worker.cached((id(self), at, rows), read)
        return units, raw.reshape(len(units), size)

    def _fill(self, into: Tensor, at: int, wanted: np.ndarray, units: np.ndarray, raw: np.ndarray) -> None:
        import gguf
        import numpy as np
        import torch

        place, held = self.held[at]
        here = np.flatnonzero(wanted >= 0)
        if not len(here):
            return
        encoded = raw[np.searchsorted(units, wanted[here])]
        values = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[held.kind]) - np.float32(place.add)
        found = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(into.device)
        if len(here) == len(into):
            into.copy_(found)
        else:
            into[torch.from_numpy(here).to(into.device)] = found.to(into.dtype)

    def _units(self) -> list[np.ndarray]:
        """For each GGUF tensor: which of its units every stored row is; -1: none."""
        import numpy as np

        found = []
        for place, _ in self.held:
            first = place.first * place.shape[-1] // self.info.columns
            units = np.full(self.info.rows, -1, dtype=np.int64)
            chosen = np.arange(self.info.rows) if place.rows is None else place.rows
            units[chosen] = first + np.arange(len(chosen))
            found.append(units)
        return found


def open_gguf(path: Path, label: str, like: Checkpoint) -> Checkpoint:
    """A GGUF file as a checkpoint with the names, shapes and config of `like`.

    Raises SourceError where the two are not of one architecture and shape.
    """
    header = read_gguf(path)
    spelling = build_spec(like.config, {name: stored.info for name, stored in like.tensors.items()})
    if header.get("general.architecture") != spelling.arch:
        text = f"{path} is a {header.get('general.architecture')}, {like.label} would be a {spelling.arch} in GGUF"
        raise SourceError(text, hint="merge models of one architecture")
    tensors = {
        name: _dequantised(like.tensors[name].info, places, header.tensors, path)
        for name, places in spelling.targets.items()
        if not _tied_away(name, places, header.tensors)
    }
    used = {place.tensor for places in spelling.targets.values() for place in places} | set(spelling.constants)
    if unknown := sorted(set(header.tensors) - used):
        raise SourceError(f"{path} holds {listing(unknown)}, which {like.label} has not")
    return replace(like, label=label, revision=None, tensors=tensors, file_hashes=header.hashes, warnings=())


def open_gguf_alone(path: Path, label: str) -> Checkpoint:
    """A GGUF file as a table of its own tensors, under their GGUF names and in their order of rows."""
    header = read_gguf(path)
    tensors: dict[str, Any] = {
        name: DequantizedGGUFTensor(TensorInfo(name, "F32", held.shape), ((TensorTarget(name, held.shape), held),))
        for name, held in header.tensors.items()
    }
    return Checkpoint(label, path.parent, None, tensors, {}, header.hashes)


def _tied_away(name: str, places: tuple[TensorTarget, ...], held: Mapping[str, GGUFTensorInfo]) -> bool:
    return all(place.tensor == "output.weight" and place.tensor not in held for place in places)


def _dequantised(
    info: TensorInfo, places: tuple[TensorTarget, ...], held: Mapping[str, GGUFTensorInfo], path: Path
) -> Any:
    pairs = []
    for place in places:
        one = held.get(place.tensor)
        if one is None:
            raise SourceError(f"{path} lacks {place.tensor}, which {info.name} would be")
        if place.turn:
            hint = "merge the model that it was made from"
            raise SourceError(f"{path}: {place.tensor} stands transposed in GGUF and cannot be read back", hint=hint)
        if one.shape != place.shape:
            raise SourceError(f"{path}: {place.tensor} has the shape {list(one.shape)}, not {list(place.shape)}")
        pairs.append((place, one))
    return DequantizedGGUFTensor(info.with_dtype("F32"), tuple(pairs))


def _runs(units: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, count) of those that follow one another."""
    import numpy as np

    if not len(units):
        return
    breaks = np.flatnonzero(np.diff(units) != 1) + 1
    for start, stop in zip([0, *breaks], [*breaks, len(units)], strict=True):
        yield int(units[start]), int(stop - start)
