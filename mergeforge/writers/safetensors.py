"""A safetensors checkpoint: shards, their headers and the index are laid out before anything is written.

Shard bytes equal those of safetensors' `save_file` for the same tensors: sorted by descending alignment of the dtype
and then by name, header padded to 8 bytes with spaces, metadata {"format": "pt"} (safetensors/src/tensor.rs, prepare).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import DTYPE_ORDER, TensorInfo, torch_dtype
from mergeforge.io.file_layout import Extent, Layout, OutputFile
from mergeforge.writers.encoder import ByteRange

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
METADATA = {"format": "pt"}
KEY = "safetensors"
# The smallest magnitude that becomes infinite when rounded to the dtype.
OVERFLOW_THRESHOLD = {"F16": 65520.0, "BF16": float.fromhex("0x1.ffp127"), "F32": math.inf, "F64": math.inf}


@dataclass(frozen=True)
class SafetensorsEncoder:
    """Casts the rows of a tensor to its dtype and writes them at its extent; a chunk is a block."""

    info: TensorInfo
    extent: Extent

    key: str = KEY
    scratch_nbytes: int = 0

    @property
    def label(self) -> str:
        return self.info.dtype

    @property
    def float_dtype(self) -> str:
        return self.info.dtype

    @property
    def file(self) -> str:
        return self.extent.file

    @property
    def chunk_rows(self) -> int:
        return self.info.block_rows

    @property
    def row_nbytes(self) -> int:
        return self.info.row_nbytes

    def chunk_nbytes(self, start: int, stop: int) -> int:
        return (stop - start) * self.info.row_nbytes

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        return [(self.extent.offset + start * self.info.row_nbytes, self.chunk_nbytes(start, stop))]

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        dtype = torch_dtype(self.info.dtype)
        assert dtype is not None
        if rows.device.type != "cpu":
            rows = rows.to(dtype)  # before the copy, so that fewer bytes cross the bus
        into.view(dtype).view(rows.shape).copy_(rows, non_blocking=True)

    def overflows(self, magnitude: float) -> bool:
        return not magnitude < OVERFLOW_THRESHOLD[self.info.dtype]


def lay_out(tensors: Sequence[TensorInfo], shard_size: int) -> Layout:
    """Files and extents of the tensors, split greedily in the given order at `shard_size` bytes.

    As in huggingface_hub's split_state_dict_into_shards_factory, a tensor larger than a shard gets a shard of its own.
    """
    shards = split_into_shards(tensors, shard_size)
    names = [SINGLE_FILE] if len(shards) == 1 else [_shard_name(index, len(shards)) for index in range(len(shards))]
    files: dict[str, OutputFile] = {}
    extents: dict[str, Extent] = {}
    for name, shard in zip(names, shards, strict=True):
        ordered = sorted(shard, key=lambda info: (DTYPE_ORDER[info.dtype], info.name))
        head, offset = header(ordered), 0
        for info in ordered:
            extents[info.name] = Extent(name, len(head) + offset, info.nbytes)
            offset += info.nbytes
        files[name] = OutputFile(head, len(head) + offset)
    return Layout(files, extents)


def split_into_shards(tensors: Sequence[TensorInfo], shard_size: int) -> list[list[TensorInfo]]:
    """The tensors of each shard, in the given order."""
    shards: list[list[TensorInfo]] = []
    current: list[TensorInfo] = []
    filled = 0
    for info in tensors:
        if info.nbytes > shard_size:
            shards.append([info])
            continue
        if filled + info.nbytes > shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(info)
        filled += info.nbytes
    return [*shards, current] if current or not shards else shards


def header(ordered: Sequence[TensorInfo]) -> bytes:
    """The header of a file with these tensors one after another: its length and JSON."""
    entries: dict[str, object] = {"__metadata__": METADATA}
    start = 0
    for info in ordered:
        stop = start + info.nbytes
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_content(layout: Layout, tensors: Sequence[TensorInfo]) -> bytes | None:
    """The content of the index file, or None if there are not several files. total_size is in bytes."""
    if SINGLE_FILE in layout.files or not layout.files:
        return None
    metadata = {
        "total_parameters": sum(info.numel for info in tensors),
        "total_size": sum(info.nbytes for info in tensors),
    }
    weight_map = {name: layout.extents[name].file for name in sorted(layout.extents)}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
