"""A GGUF file that becomes other GGUF files: its header, its tensors as stored or as values, and its name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.gguf_checkpoint import dequantized
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.gguf.key_values import Keys
from mergeforge.gguf.reader import GGUFHeader, GGUFTensorInfo, read_gguf
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

PLAIN = ("F32", "F16", "BF16")  # stored as safetensors stores them
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class GGUFSource:
    """The file, or all splits of it. keys: without those of splits and of the alignment, which are written anew."""

    path: Path
    header: GGUFHeader
    keys: Keys

    @property
    def arch(self) -> str:
        return str(self.header.get("general.architecture"))

    @property
    def splits(self) -> list[str]:
        """The names of its files."""
        return list(self.header.hashes)

    def split_of(self, stored: GGUFTensorInfo) -> int:
        """The index of the split that a tensor is in."""
        return self.splits.index(Path(stored.file.path).name)

    @property
    def checkpoint(self) -> Checkpoint:
        """The file as an input of a plan."""
        tensors: dict[str, Any] = {name: raw_tensor(stored) for name, stored in self.header.tensors.items()}
        return Checkpoint(str(self.path), self.path.parent, None, tensors, {}, self.header.hashes)


def read_source(path: Path) -> GGUFSource:
    """Read the header. Raises SourceError for a file that is not a model."""
    header = read_gguf(path)
    kind = header.get("general.type")
    if not isinstance(header.get("general.architecture"), str):
        raise SourceError(f"{path} has no general.architecture", hint="give a model's GGUF file")
    if kind in ("adapter", "imatrix") or not header.tensors:
        what = f"is an {kind}" if header.tensors else "holds no tensors"
        raise SourceError(f"{path} {what}, not a model", hint="give a model's GGUF file")
    left_out = (*_SPLIT_KEYS, "general.alignment")
    return GGUFSource(path, header, {key: value for key, value in header.keys.items() if key not in left_out})


def model_name(path: Path) -> str:
    """The name of the model in a GGUF file: its stem without the number of its split and its type."""
    stem = _SPLIT_NAME.sub("", path.stem)
    name, _, type_ = stem.replace(".", "-").rpartition("-")
    return stem[: len(name)] if name and type_.lower() in FILE_TYPES else stem


def raw_tensor(stored: GGUFTensorInfo) -> StoredTensor:
    """The bytes of a tensor as they are stored, in rows."""
    rows, columns = _matrix(stored)
    info = TensorInfo(stored.name, "U8", (rows, stored.row_nbytes(columns)))
    return StoredTensor(info, stored.file, stored.offset)


def tensor_values(stored: GGUFTensorInfo) -> LazyTensor:
    """The values of a tensor, in rows. Raises SourceError for types that cannot be dequantized."""
    info = TensorInfo(stored.name, "F32", _matrix(stored))
    if stored.ggml_type in PLAIN:
        return StoredTensor(info.with_dtype(stored.ggml_type), stored.file, stored.offset)
    return dequantized(info, [(TensorTarget(stored.name, info.shape), stored)])


def _matrix(stored: GGUFTensorInfo) -> tuple[int, int]:
    """The shape of a tensor seen as rows."""
    return math.prod(stored.shape[:-1]), stored.shape[-1]
