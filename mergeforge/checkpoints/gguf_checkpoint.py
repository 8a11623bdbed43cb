"""Tensors of a GGUF file under their Hugging Face names, dequantized row by row and in the order of the checkpoint.

The TensorTargets that say where a row goes in a GGUF file also say where it comes from. The values are those of the
gguf package's dequantizers (gguf-py/gguf/quants.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.architectures import TensorTarget, build_spec
from mergeforge.gguf.reader import GGUFTensorInfo, read_gguf
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.row_gather import consecutive_runs
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

_STORED_PLAIN = ("I8", "I16", "I32", "I64", "F64")  # types without blocks that gguf-py does not dequantize
SCRATCH_BLOCKS = 6  # of dequantization: the bytes, integer and float temporaries, the result


@dataclass(frozen=True, eq=False)
class DequantizedGGUFTensor:
    """The rows of one checkpoint tensor, from the GGUF tensors that hold them (two for a fused gate and up)."""

    info: TensorInfo
    sources: tuple[tuple[TensorTarget, GGUFTensorInfo], ...]

    inputs: tuple[LazyTensor, ...] = ()
    needs_stats: bool = False

    @property
    def file(self) -> InputFile:
        return self.sources[0][1].file

    @property
    def stored_nbytes(self) -> int:
        """The bytes of its rows as they are stored, for the size of the input."""
        return self.info.rows * max(stored.row_nbytes(self.info.columns) for _, stored in self.sources)

    @property
    def memory_cost(self) -> MemoryCost:
        row_nbytes = max(stored.row_nbytes(self.info.columns) for _, stored in self.sources)
        return MemoryCost(row_nbytes=row_nbytes, fixed_nbytes=ALIGNMENT * 64, scratch_blocks=SCRATCH_BLOCKS)

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        units_of = self._units()
        loaded = [self._load_units(index, units_of[index], rows, worker) for index in range(len(self.sources))]
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            for index, (units, raw) in enumerate(loaded):
                self._fill(out, index, units_of[index][start:stop], units, raw)
            return out

        return block

    def _load_units(
        self, index: int, all_units: np.ndarray, rows: range, worker: Worker
    ) -> tuple[np.ndarray, np.ndarray]:
        """The units of GGUF tensor `index` that the rows need, ascending, and their bytes."""
        import numpy as np

        stored = self.sources[index][1]
        size = stored.row_nbytes(self.info.columns)
        units = np.sort(all_units[rows.start : rows.stop])
        units = units[np.searchsorted(units, 0) :]

        def read() -> np.ndarray:
            raw = worker.allocate(len(units) * size)
            filled = 0
            for first, count in consecutive_runs(units):
                stored.file.read_into(raw[filled : filled + count * size].data, stored.offset + first * size)
                filled += count * size
            return raw

        raw = worker.cached((id(self), index, rows), read)
        return units, raw.reshape(len(units), size)

    def _fill(self, out: Tensor, index: int, requested: np.ndarray, units: np.ndarray, raw: np.ndarray) -> None:
        import gguf
        import numpy as np
        import torch

        target, stored = self.sources[index]
        positions = np.flatnonzero(requested >= 0)
        if not len(positions):
            return
        encoded = raw[np.searchsorted(units, requested[positions])]
        values = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[stored.ggml_type]) - np.float32(target.add)
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(out.device)
        if len(positions) == len(out):
            out.copy_(tensor)
        else:
            out[torch.from_numpy(positions).to(out.device)] = tensor.to(out.dtype)

    def _units(self) -> list[np.ndarray]:
        """For each GGUF tensor, the unit that holds each row (-1: none); a unit is as wide as a row of this tensor."""
        import numpy as np

        units_of = []
        for target, _ in self.sources:
            first = target.first_row * target.shape[-1] // self.info.columns
            units = np.full(self.info.rows, -1, dtype=np.int64)
            chosen = np.arange(self.info.rows) if target.rows is None else target.rows
            units[chosen] = first + np.arange(len(chosen))
            units_of.append(units)
        return units_of


def open_gguf(path: Path, label: str, reference: Checkpoint) -> Checkpoint:
    """Open a GGUF file as a checkpoint with the names, shapes and config of `reference`.

    Raises SourceError if the two differ in architecture or shapes.
    """
    header = read_gguf(path)
    spec = build_spec(reference.config, {name: stored.info for name, stored in reference.tensors.items()})
    if header.get("general.architecture") != spec.arch:
        arch = header.get("general.architecture")
        text = f"{path} has the architecture {arch}, but {reference.label} is {spec.arch} in GGUF"
        raise SourceError(text, hint="all models of a merge must have the same architecture")
    tensors = {
        name: _dequantized_tensor(reference.tensors[name].info, targets, header.tensors, path)
        for name, targets in spec.targets.items()
        if not _is_omitted_head(targets, header.tensors)
    }
    used = {target.tensor for targets in spec.targets.values() for target in targets} | set(spec.constants)
    if unknown := sorted(set(header.tensors) - used):
        raise SourceError(f"{path} holds {format_list(unknown)}, which {reference.label} does not have")
    return replace(reference, label=label, revision=None, tensors=tensors, file_hashes=header.hashes, warnings=())


def open_gguf_alone(path: Path, label: str) -> Checkpoint:
    """Open a GGUF file as a checkpoint of its own tensors, with their GGUF names and row order.

    Raises SourceError for types that cannot be dequantized.
    """
    header = read_gguf(path)
    tensors: dict[str, Any] = {name: _own_tensor(stored) for name, stored in header.tensors.items()}
    return Checkpoint(label, path.parent, None, tensors, {}, header.hashes)


def dequantized(info: TensorInfo, sources: Sequence[tuple[TensorTarget, GGUFTensorInfo]]) -> DequantizedGGUFTensor:
    """The values of GGUF tensors, with this name and shape. Raises SourceError for types that have no float values."""
    for _, stored in sources:
        if not stored.can_be_dequantized:
            text = f"{stored.file.path}: {stored.name} has the type {stored.ggml_type}, which cannot be converted"
            raise SourceError(text, hint="use the model that the GGUF file was made from")
    return DequantizedGGUFTensor(info.with_dtype("F32"), tuple(sources))


def _own_tensor(stored: GGUFTensorInfo) -> Any:
    """A tensor under its GGUF name; integers and F64 are stored as in safetensors."""
    info = TensorInfo(stored.name, "F32", stored.shape)
    if stored.ggml_type in _STORED_PLAIN:
        return StoredTensor(info.with_dtype(stored.ggml_type), stored.file, stored.offset)
    return dequantized(info, [(TensorTarget(stored.name, stored.shape), stored)])


def _is_omitted_head(targets: tuple[TensorTarget, ...], stored: Mapping[str, GGUFTensorInfo]) -> bool:
    """Whether a tensor is a tied head, which the GGUF file does not hold."""
    return all(target.tensor == "output.weight" and target.tensor not in stored for target in targets)


def _dequantized_tensor(
    info: TensorInfo, targets: tuple[TensorTarget, ...], by_name: Mapping[str, GGUFTensorInfo], path: Path
) -> Any:
    sources = []
    for target in targets:
        stored = by_name.get(target.tensor)
        if stored is None:
            raise SourceError(f"{path} lacks {target.tensor}, the GGUF name of {info.name}")
        if not target.keeps_rows:
            hint = "use the model that the GGUF file was made from"
            how = "transposed" if target.transpose else "changed"
            raise SourceError(f"{path}: {target.tensor} is {how} in GGUF and cannot be read back", hint=hint)
        if stored.shape != target.shape:
            raise SourceError(f"{path}: {target.tensor} has the shape {list(stored.shape)}, not {list(target.shape)}")
        sources.append((target, stored))
    return dequantized(info, sources)
