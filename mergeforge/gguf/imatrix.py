"""Importance matrices: how much each column of a tensor matters, as measured by llama-imatrix.

Two formats: GGUF (for each tensor NAME the sums NAME.in_sum2, columns x experts, and NAME.counts) and the older .dat.
The weights are means of squared activations. A matrix that was never used, such as an expert that no token
reached, has count 0; all its columns get weight 1. A tensor that is not in the file is quantized without weights.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mergeforge.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMS, COUNTS = ".in_sum2", ".counts"
HINT = "create it with llama-imatrix"


@dataclass(frozen=True, eq=False)
class ImatrixFile:
    """An imatrix file: the column weights of each GGUF tensor (experts x columns, float32), and its own metadata."""

    path: Path
    weights: Mapping[str, NDArray[np.float32]]
    datasets: tuple[str, ...]
    chunks: int

    def column_weights(self, name: str, columns: int, experts: int = 1) -> NDArray[np.float32] | None:
        """The weights of a tensor, experts x columns; None if the file has none for it.

        Raises SourceError if the size differs. For an embedding the result is then None, as in llama-quantize.
        """
        weights = self.weights.get(name)
        if weights is None or weights.size == columns * experts:
            return None if weights is None else weights.reshape(experts, columns)
        if name in ("token_embd.weight", "per_layer_token_embd.weight"):
            return None
        sizes = f"{weights.shape[0]} x {weights.shape[1]} values, but the tensor needs {experts} x {columns}"
        raise SourceError(f"{self.path}: {name} has {sizes}", hint="use the imatrix of this model")


def read_imatrix(path: Path) -> ImatrixFile:
    """Read an imatrix file of either format. Raises SourceError."""
    try:
        with path.open("rb") as file:
            imatrix = _read_gguf(path) if file.read(4) == b"GGUF" else _read_dat(path)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}", hint="give the path of an imatrix file") from None
    for name, weights in imatrix.weights.items():
        _check(path, name, weights)
    return imatrix


def _check(path: Path, name: str, weights: Any) -> None:
    import numpy as np

    if not np.isfinite(weights).all():
        raise SourceError(f"{path}: {name} has a weight that is not finite", hint=f"{HINT} again")
    if (weights < 0).any():
        raise SourceError(f"{path}: {name} has a negative weight", hint=f"{HINT} again")


def _read_gguf(path: Path) -> ImatrixFile:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        keys = {name: field.contents() for name, field in reader.fields.items() if name.startswith("imatrix.")}
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a complete GGUF file ({error})", hint=HINT) from None
    missing = [key for key in ("datasets", "chunk_count", "chunk_size") if f"imatrix.{key}" not in keys]
    if missing:
        raise SourceError(f"{path}: not an imatrix: it lacks the key imatrix.{missing[0]}", hint=HINT)
    names = {name.removesuffix(suffix) for name in tensors for suffix in (SUMS, COUNTS) if name.endswith(suffix)}
    if not names:
        raise SourceError(f"{path}: the imatrix has no entries", hint=HINT)
    weights = {name: _mean(path, name, tensors) for name in sorted(names)}
    datasets = keys["imatrix.datasets"]
    return ImatrixFile(path, weights, tuple(map(str, datasets)), int(keys["imatrix.chunk_count"]))


def _mean(path: Path, name: str, tensors: Mapping[str, Any]) -> NDArray[np.float32]:
    """in_sum2 / counts for each expert, in float32 as llama-quantize divides."""
    import numpy as np

    sums, counts = tensors.get(name + SUMS), tensors.get(name + COUNTS)
    if sums is None or counts is None:
        raise SourceError(f"{path}: {name} needs both sums and counts", hint=f"{HINT} again")
    if sums.tensor_type.name != "F32" or counts.tensor_type.name != "F32":
        raise SourceError(f"{path}: {name}: sums and counts must be F32", hint=f"{HINT} again")
    count = np.asarray(counts.data, np.float32).reshape(-1)
    if not count.size or not np.isfinite(count).all() or sums.data.size % count.size:
        raise SourceError(f"{path}: {name}: {sums.data.size} sums do not fit {count.size} counts", hint=f"{HINT} again")
    rounded = np.copysign(np.floor(np.abs(count) + np.float32(0.5)), count).reshape(-1, 1)  # lround
    total = np.asarray(sums.data, np.float32).reshape(count.size, -1)
    divisor = np.where(rounded > 0, rounded, np.float32(1)).astype(np.float32)
    return np.where(rounded > 0, total / divisor, np.float32(1)).astype(np.float32)


def _read_dat(path: Path) -> ImatrixFile:
    with path.open("rb") as file:
        count = _read_int32(file, path)
        if not 1 <= count < 1 << 20:
            raise SourceError(f"{path}: neither a GGUF nor a .dat imatrix file", hint=HINT)
        weights = dict(_dat_entry(file, path) for _ in range(count))
        trailer = file.read()
    chunks, datasets = _dat_trailer(trailer)
    return ImatrixFile(path, weights, datasets, chunks)


def _dat_entry(file: BinaryIO, path: Path) -> tuple[str, NDArray[np.float32]]:
    import numpy as np

    name = _read_exactly(file, path, _read_int32(file, path)).split(b"\0")[0].decode("utf-8", "replace")
    calls, size = _read_int32(file, path), _read_int32(file, path)
    if size < 1:
        raise SourceError(f"{path}: {name} has {size} values", hint=f"{HINT} again")
    sums = np.frombuffer(_read_exactly(file, path, 4 * size), "<f4").astype(np.float32).reshape(1, -1)
    return name, sums / np.float32(calls) if calls > 0 else sums


def _dat_trailer(data: bytes) -> tuple[int, tuple[str, ...]]:
    """The number of chunks and the name of the data set; both are optional."""
    if len(data) < 4:
        return 0, ()
    chunks: int = struct.unpack_from("<i", data)[0]
    size = struct.unpack_from("<i", data, 4)[0] if len(data) >= 8 else 0
    name = data[8 : 8 + size] if 0 < size <= len(data) - 8 else b""
    return chunks, (name.decode("utf-8", "replace"),) if name else ()


def _read_int32(file: BinaryIO, path: Path) -> int:
    value: int = struct.unpack("<i", _read_exactly(file, path, 4))[0]
    return value


def _read_exactly(file: BinaryIO, path: Path, size: int) -> bytes:
    data = file.read(size) if 0 <= size < 1 << 33 else b""
    if len(data) != size or size < 0:
        raise SourceError(f"{path}: ends within an entry, or is not a .dat imatrix file", hint=HINT)
    return data
