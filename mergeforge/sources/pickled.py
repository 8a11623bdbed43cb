"""Tensors of a torch.save file, read at their offsets.

torch's weights_only loader (which runs no code from the file) maps the file without reading it and
tells names, dtypes and shapes; where each storage's bytes lie follows from the file being a zip of
uncompressed records. Then rows are read as from a safetensors file.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from mergeforge.disk import InputFile
from mergeforge.errors import SourceError
from mergeforge.sources.stored import Stored
from mergeforge.tensors import TensorInfo, dtype_name


def read_pickled(path: Path) -> tuple[dict[str, Stored], str]:
    """Every tensor of the file, and the sha256 of its zip directory.

    Raises SourceError when the file holds anything but contiguous tensors by name.
    """
    import torch

    if not zipfile.is_zipfile(path):
        raise SourceError(f"{path} is in torch's old format", hint="save it again with a torch of 1.6 or later")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler raises, the file is refused
        first = str(error).splitlines()[0]
        raise SourceError(f"{path} is refused by torch's weights_only loader: {first}") from None
    tensors = _tensors(value, path)
    records = _records(path)
    digest = hashlib.sha256(repr(sorted(records.items())).encode()).hexdigest()
    if not tensors:
        return {}, digest
    file = InputFile(path)
    first_record = min(offset for offset, nbytes in records.values() if nbytes)
    first_byte = min(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    found = {}
    for name, tensor in tensors.items():
        start = first_record + tensor.untyped_storage().data_ptr() - first_byte if tensor.numel() else 0
        if tensor.numel() and (start, tensor.untyped_storage().nbytes()) not in records.values():
            raise SourceError(f"{path}: cannot tell where {name!r} lies", hint="convert it to safetensors")
        info = TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        found[name] = Stored(info, file, start + tensor.storage_offset() * tensor.element_size())
    return found, digest


def _tensors(value: Any, path: Path) -> dict[str, Any]:
    import torch

    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(item, torch.Tensor) for item in value.values()):
        raise SourceError(f"{path} holds something other than tensors by name")
    if odd := [name for name, tensor in value.items() if not tensor.is_contiguous()]:
        raise SourceError(f"{path}: {odd[0]!r} is not contiguous", hint="convert it to safetensors")
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
