"""Read the header of a safetensors file strictly.

The rules are those of safetensors/src/tensor.rs, and stricter where its parser is lenient: duplicate keys and leading
spaces are refused, and numbers must be plain integers.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from mergeforge.core.tensor_info import DTYPES, TensorInfo
from mergeforge.errors import SourceError
from mergeforge.io.disk import DiskFile, InputFile

MAX_HEADER_NBYTES = 100_000_000
MAX_NUMBER = 1 << 48
MAX_LFS_POINTER_NBYTES = 1024  # git-lfs/docs/spec.md
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_SHAPE_PRODUCT = 1 << 58  # of leading dimensions: the size in bits fits in 64 bits for every reader


@dataclass(frozen=True)
class Header:
    """The contents of a file: each tensor with its absolute offset, the metadata, and the sha256 of the header."""

    file: InputFile
    tensors: dict[str, tuple[TensorInfo, int]]
    metadata: dict[str, str]
    sha256: str


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a local file; no tensor is read.

    Raises SourceError, which names the file, the tensor and the violated rule.
    """
    path = os.fspath(path)
    check_is_file(path)
    file = DiskFile(path)
    try:
        return parse_header(file)
    finally:
        file.close()  # reopened at the first read


def parse_header(file: InputFile) -> Header:
    """Read and check the header of any input file."""
    path = file.path
    length = int.from_bytes(_read(file, 0, 8), "little")
    if length > MAX_HEADER_NBYTES or 8 + length > file.size:
        truncated = length <= MAX_HEADER_NBYTES
        hint = "download it again" if truncated else "is it a safetensors file?"
        raise SourceError(f"{path}: the header claims {length} bytes, but the file has {file.size}", hint=hint)
    raw = _read(file, 8, length)
    entries = _json(raw, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = {name: _entry(name, entry, 8 + length, path) for name, entry in entries.items()}
    _check_extents(tensors, 8 + length, file.size, path)
    return Header(file, tensors, metadata, hashlib.sha256(raw).hexdigest())


def check_is_file(path: str) -> None:
    """Refuse a folder, pipe, device or Git LFS pointer before it is read. Raises SourceError."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path} is not a regular file")
    if status.st_size <= MAX_LFS_POINTER_NBYTES and is_lfs_pointer(path):
        text = f"{path} is a Git LFS pointer: the file itself was not downloaded"
        raise SourceError(text, hint="run `git lfs pull` in its folder, or download it with `hf download`")


def is_lfs_pointer(path: str) -> bool:
    """Whether a file is what `git clone` without Git LFS leaves in place of a large one."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def _read(file: InputFile, offset: int, length: int) -> bytes:
    if offset + length > file.size:
        raise SourceError(f"{file.path} ends within its header", hint="download it again")
    data = bytearray(length)
    file.read_into(memoryview(data), offset, keep=True)
    return bytes(data)


def _json(raw: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise SourceError(f"{path}: duplicate key {duplicate!r} in the header")
        return result

    if not raw.startswith(b"{"):
        raise SourceError(f"{path}: the header is not a JSON object", hint="is it a safetensors file?")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair raises ValueError
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path}: the header is not JSON ({type(error).__name__})", hint="download it again"
        ) from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: the header is not a JSON object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _metadata(value: Any, path: str) -> dict[str, str]:
    if value is None:  # safetensors reads it as no metadata
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SourceError(f"{path}: __metadata__ must map strings to strings")
    return value


def _entry(name: str, entry: Any, data_start: int, path: str) -> tuple[TensorInfo, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise SourceError(f"{path}: the entry of {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(f"{path}: {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(number) for number in [*shape, begin, end]):
        raise SourceError(f"{path}: {name!r} has a shape or offsets that are not whole numbers")
    if any(product >= MAX_SHAPE_PRODUCT for product in accumulate(shape, mul)):
        raise SourceError(f"{path}: {name!r} has the impossible shape {shape}")
    info = TensorInfo(name, dtype, tuple(shape))
    if info.numel * info.bits != 8 * (end - begin):
        claimed = f"{dtype} {list(shape)} takes {info.nbytes} bytes, but its offsets span {end - begin}"
        raise SourceError(f"{path}: {name!r}: {claimed}")
    return info, data_start + begin


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _check_extents(tensors: dict[str, tuple[TensorInfo, int]], start: int, size: int, path: str) -> None:
    """Check that the tensors fill the file from the header to the end, with no gap or overlap. Raises SourceError."""
    end = start
    for info, offset in sorted(tensors.values(), key=lambda entry: (entry[1], entry[0].nbytes)):
        if offset != end:
            problem = "overlaps the tensor before it" if offset < end else "leaves a gap before it"
            raise SourceError(f"{path}: {info.name!r} at byte {offset} {problem}")
        end += info.nbytes
    if end > size:
        raise SourceError(f"{path} should have {end} bytes but has {size}", hint="it is truncated; download it again")
    if end < size:
        raise SourceError(
            f"{path} should have {end} bytes but has {size}", hint="there are bytes after its last tensor"
        )
