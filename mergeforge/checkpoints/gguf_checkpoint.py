"""Tensors of a GGUF file under their Hugging Face names, dequantized row by row and in the order of the checkpoint.

The TensorTargets that say where a row goes in a GGUF file also say where it comes from. The values are those of ggml,
by mergeforge.gguf.dequantize.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.gguf_rows import KeptRows, TransposedRows, read_rows
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.architectures import TensorTarget, build_spec
from mergeforge.gguf.reader import GGUFTensorInfo, read_gguf
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STORED_PLAIN = ("I8", "I16", "I32", "I64", "F64")  # types without blocks that gguf-py does not dequantize


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
    def files(self) -> tuple[InputFile, ...]:
        return tuple(stored.file for _, stored in self.sources)

    @property
    def stored_nbytes(self) -> int:
        """The bytes of its rows as they are stored, for the size of the input."""
        return sum(part.numel // part.stored.block * part.stored.block_nbytes for part in self.parts)

    @cached_property
    def parts(self) -> tuple[KeptRows | TransposedRows, ...]:
        return tuple(read_rows(self.info, target, stored) for target, stored in self.sources)

    @property
    def memory_cost(self) -> MemoryCost:
        costs = [part.memory_cost for part in self.parts]
        return MemoryCost(
            row_nbytes=sum(cost.row_nbytes for cost in costs),
            fixed_nbytes=ALIGNMENT + sum(cost.fixed_nbytes for cost in costs),
            scratch_blocks=max(cost.scratch_blocks for cost in costs),  # one part is filled after the other
        )

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        fills = [part.load(rows, worker) for part in self.parts]
        is_whole = sum(part.numel for part in self.parts) >= self.info.numel
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            if not is_whole:
                out.zero_()  # rows that the GGUF file leaves out
            for fill in fills:
                fill(out, start, stop)
            return out

        return block


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


def dequantized(
    info: TensorInfo, sources: Sequence[tuple[TensorTarget, GGUFTensorInfo]], dtype: str = "F32"
) -> DequantizedGGUFTensor:
    """The values of GGUF tensors, with this name and shape. Raises SourceError for types that have no float values.

    dtype: that of the tensor, if a merge does not say otherwise.
    """
    for _, stored in sources:
        if not stored.can_be_dequantized:
            text = f"{stored.file.path}: {stored.name} has the type {stored.ggml_type}, which cannot be converted"
            raise SourceError(text, hint="use the model that the GGUF file was made from")
    return DequantizedGGUFTensor(info.with_dtype(dtype), tuple(sources))


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
        if stored.shape != target.shape:
            raise SourceError(f"{path}: {target.tensor} has the shape {list(stored.shape)}, not {list(target.shape)}")
        sources.append((target, stored))
    return dequantized(info, sources)
