"""The header of one safetensors file, read strictly.

The rules are those of safetensors/src/tensor.rs, and stricter where its parser lets things pass:
duplicate keys and leading spaces are refused, numbers must be plain whole numbers.
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

LARGEST_HEADER = 100_000_000
LARGEST_NUMBER = 1 << 48
LARGEST_PRODUCT = 1 << 58  # of dimensions, one after another: what any reader's 64 bits hold in bits


@dataclass(frozen=True)
class Header:
    """What a file holds: each tensor with its absolute offset, the metadata, and the header's hash."""

    file: InputFile
    tensors: dict[str, tuple[TensorInfo, int]]
    metadata: dict[str, str]
    sha256: str


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check a header; no tensor is read.

    Raises SourceError that names the file, the tensor and the broken rule.
    """
    path = os.fspath(path)
    require_regular(path)
    file = DiskFile(path)
    try:
        return header_of(file)
    finally:
        file.close()  # opened again at the first read


def header_of(file: InputFile) -> Header:
    """As read_header, of a file that need not lie on a disk."""
    path = file.path
    length = int.from_bytes(_read(file, 0, 8), "little")
    if length > LARGEST_HEADER or 8 + length > file.size:
        truncated = length <= LARGEST_HEADER
        hint = "download it again" if truncated else "is it a safetensors file at all?"
        raise SourceError(f"{path}: its header claims {length} bytes, the file has {file.size}", hint=hint)
    raw = _read(file, 8, length)
    entries = _json(raw, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = {name: _entry(name, entry, 8 + length, path) for name, entry in entries.items()}
    _check_extents(tensors, 8 + length, file.size, path)
    return Header(file, tensors, metadata, hashlib.sha256(raw).hexdigest())


def require_regular(path: str) -> None:
    """Refuse what is no file (a folder, a pipe, a device) before it is opened. Raises SourceError."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise SourceError(f"{path} is not a regular file")


def _read(file: InputFile, offset: int, length: int) -> bytes:
    if offset + length > file.size:
        raise SourceError(f"{file.path} is cut off within its header", hint="download it again")
    data = bytearray(length)
    file.read_into(memoryview(data), offset, keep=True)
    return bytes(data)


def _json(raw: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise SourceError(f"{path}: the header holds {twice!r} twice")
        return result

    if not raw.startswith(b"{"):
        raise SourceError(f"{path}: its header is not a JSON object", hint="is it a safetensors file at all?")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text: raises ValueError
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path}: its header is not JSON ({type(error).__name__})", hint="download it again"
        ) from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: its header is not a JSON object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _metadata(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SourceError(f"{path}: __metadata__ must map text to text")
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
    if any(product >= LARGEST_PRODUCT for product in accumulate(shape, mul)):
        raise SourceError(f"{path}: {name!r} has the impossible shape {shape}")
    info = TensorInfo(name, dtype, tuple(shape))
    if info.numel * info.bits != 8 * (end - begin):
        claimed = f"{dtype} {list(shape)} takes {info.nbytes} bytes, its offsets span {end - begin}"
        raise SourceError(f"{path}: {name!r}: {claimed}")
    return info, data_start + begin


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_NUMBER


def _check_extents(tensors: dict[str, tuple[TensorInfo, int]], start: int, size: int, path: str) -> None:
    """The tensors must fill the file from the header to its end, with no gap and no overlap."""
    at = start
    for info, offset in sorted(tensors.values(), key=lambda entry: (entry[1], entry[0].nbytes)):
        if offset != at:
            what = "overlaps the one before it" if offset < at else "leaves a gap before it"
            raise SourceError(f"{path}: {info.name!r} at byte {offset} {what}")
        at += info.nbytes
    if at > size:
        raise SourceError(f"{path} should have {at} bytes and has {size}", hint="it is truncated: download it again")
    if at < size:
        raise SourceError(f"{path} should have {at} bytes and has {size}", hint="bytes follow its last tensor")
