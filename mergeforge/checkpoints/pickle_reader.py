"""Read the tensors of a torch.save file at their offsets.

torch's weights_only loader (which runs no code from the file) maps the file without reading it and gives names, dtypes
and shapes. The file is a zip of uncompressed records, so the offsets of the storages' bytes are known, and rows are
read as from a safetensors file.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergeforge.core.tensor_info import DTYPES, TensorInfo, dtype_name
from mergeforge.errors import SourceError
from mergeforge.io.disk import DiskFile
from mergeforge.tensors.stored import StoredTensor


def read_pickled(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """Return every tensor of the file, and the sha256 of its zip directory.

    Raises SourceError if the file holds anything but contiguous tensors by name.
    """
    import torch

    if not zipfile.is_zipfile(path):
        text = f"{path} is not a zip file: not a torch pickle, or one in the old format"
        raise SourceError(text, hint="save it again with torch 1.6 or later")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler may raise anything; the file is refused
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(f"{path} is refused by torch's weights_only loader: {reason}") from None
    tensors = _tensors(value, path)
    records = _records(path)
    offsets = _offsets(value, records, path)
    digest = hashlib.sha256(repr(sorted(records.items())).encode()).hexdigest()
    file = DiskFile(path)
    stored = {}
    for name, tensor in tensors.items():
        start = offsets[tensor.untyped_storage().data_ptr()] if tensor.numel() else 0
        info = TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        stored[name] = StoredTensor(info, file, start + tensor.storage_offset() * tensor.element_size())
    return stored, digest


def _offsets(value: Any, records: dict[str, tuple[int, int]], path: Path) -> dict[int, int]:
    """Map each storage's address in memory to the offset of its bytes in the file.

    The file is mapped contiguously, so all addresses differ from the offsets by the same number: the one that maps
    every storage to a record, with no record left over.
    """
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(value) if storage.nbytes()}
    expected = sorted((offset, nbytes) for offset, nbytes in records.values() if nbytes)
    shift = min(storages, default=0) - expected[0][0] if expected else 0
    if sorted((address - shift, nbytes) for address, nbytes in storages.items()) != expected:
        raise SourceError(f"{path}: the offsets of its tensors cannot be determined", hint="convert it to safetensors")
    return {address: address - shift for address in storages}


def _storages(value: Any) -> Iterator[Any]:
    """The storage of every tensor in the loaded value, at any depth."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value.untyped_storage()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _storages(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _storages(part)


def _tensors(value: Any, path: Path) -> dict[str, Any]:
    import torch

    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(item, torch.Tensor) for name, item in value.items()
    ):
        raise SourceError(f"{path} does not hold a mapping of names to tensors")
    known = {f"torch.{name}" for _, name in DTYPES.values()}
    for name, tensor in value.items():
        if tensor.layout is not torch.strided or str(tensor.dtype) not in known:
            raise SourceError(f"{path}: {name!r} is {tensor.dtype} ({tensor.layout}), which safetensors cannot hold")
        if not tensor.is_contiguous():
            raise SourceError(f"{path}: {name!r} is not contiguous", hint="convert it to safetensors")
    return value


def _records(path: Path) -> dict[str, tuple[int, int]]:
    """The offset and size of each storage's bytes in the zip file."""
    records = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
        for entry in archive.infolist():
            if "/data/" not in entry.filename:
                continue
            if entry.compress_type != zipfile.ZIP_STORED:
                raise SourceError(f"{path}: its tensors are compressed", hint="convert it to safetensors")
            stream.seek(entry.header_offset + 26)
            lengths = stream.read(4)
            name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
            records[entry.filename] = (entry.header_offset + 30 + name + extra, entry.file_size)
    return records
