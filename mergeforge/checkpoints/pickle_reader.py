"""Tensors of a torch.save file, read at their offsets.

torch's weights_only loader (which runs no code from the file) maps the file without reading it and
tells names, dtypes and shapes; where each storage's bytes lie follows from the file being a zip of
uncompressed records. Then rows are read as from a safetensors file.
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
    """Every tensor of the file, and the sha256 of its zip directory.

    Raises SourceError when the file holds anything but contiguous tensors by name.
    """
    import torch

    if not zipfile.is_zipfile(path):
        text = f"{path} is no zip file: not a pickle of torch, or one in its old format"
        raise SourceError(text, hint="save it again with a torch of 1.6 or later")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler raises, the file is refused
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(f"{path} is refused by torch's weights_only loader: {first}") from None
    tensors = _tensors(value, path)
    records = _records(path)
    offsets = _offsets(value, records, path)
    digest = hashlib.sha256(repr(sorted(records.items())).encode()).hexdigest()
    file = DiskFile(path)
    found = {}
    for name, tensor in tensors.items():
        start = offsets[tensor.untyped_storage().data_ptr()] if tensor.numel() else 0
        info = TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        found[name] = StoredTensor(info, file, start + tensor.storage_offset() * tensor.element_size())
    return found, digest


def _offsets(value: Any, records: dict[str, tuple[int, int]], path: Path) -> dict[int, int]:
    """Each storage's address in memory -> the offset of its bytes in the file.

    The file is mapped as one piece, so the two differ by one number: the one that brings every
    storage of the file onto a record, with no record left over.
    """
    storages = {one.data_ptr(): one.nbytes() for one in _storages(value) if one.nbytes()}
    held = sorted((offset, nbytes) for offset, nbytes in records.values() if nbytes)
    shift = min(storages, default=0) - held[0][0] if held else 0
    if sorted((address - shift, nbytes) for address, nbytes in storages.items()) != held:
        raise SourceError(f"{path}: cannot tell where its tensors lie", hint="convert it to safetensors")
    return {address: address - shift for address in storages}


def _storages(value: Any) -> Iterator[Any]:
    """The storage of every tensor in what was loaded, wherever it stands."""
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
        raise SourceError(f"{path} holds something other than tensors by name")
    known = {f"torch.{name}" for _, name in DTYPES.values()}
    for name, tensor in value.items():
        if tensor.layout is not torch.strided or str(tensor.dtype) not in known:
            raise SourceError(f"{path}: {name!r} is {tensor.dtype} ({tensor.layout}), which safetensors cannot hold")
        if not tensor.is_contiguous():
            raise SourceError(f"{path}: {name!r} is not contiguous", hint="convert it to safetensors")
    return value


def _records(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each storage's bytes in the zip file."""
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
