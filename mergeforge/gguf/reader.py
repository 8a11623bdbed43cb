"""The header of a GGUF file and of its other splits, read strictly.

Format: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.dequantize import GGUF_PY_TYPES, OWN_TYPES
from mergeforge.gguf.key_values import VALUE_TYPES, Value, is_utf8
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType
from mergeforge.io.disk import DiskFile, InputFile
from mergeforge.io.safetensors_header import check_is_file

LARGEST_COUNT = 1 << 28  # of keys, tensors, items and bytes of a string: far above any model's
DEQUANTIZED_TYPES = GGUF_PY_TYPES | OWN_TYPES.keys()
_KIND_BY_NUMBER = {number: (kind, form) for kind, (number, form) in VALUE_TYPES.items()}
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensorInfo:
    """A tensor in a GGUF file: shape with the slowest dimension first, ggml type, offset from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    block: int
    block_nbytes: int
    file: InputFile
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_nbytes

    @property
    def quant_type(self) -> QuantType:
        """Its type; one that mergeforge does not encode can only be copied."""
        import gguf

        if self.ggml_type in QUANT_TYPES:
            return QUANT_TYPES[self.ggml_type]
        number = int(gguf.GGMLQuantizationType[self.ggml_type])
        return QuantType(self.ggml_type, number, self.block, self.block_nbytes, None)

    @property
    def can_be_dequantized(self) -> bool:
        return self.ggml_type in DEQUANTIZED_TYPES

    def row_nbytes(self, columns: int) -> int:
        return columns // self.block * self.block_nbytes


@dataclass(frozen=True)
class GGUFHeader:
    """Key/values and tensors of a GGUF model, from all of its files; `hashes`: file name -> sha256 of its header."""

    keys: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensorInfo]
    hashes: Mapping[str, str]

    def get(self, key: str) -> Any:
        return self.keys[key].value if key in self.keys else None


def read_gguf(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file and of its other splits, without reading any tensor.

    Raises SourceError, which names the file and the problem.
    """
    keys: dict[str, Value] = {}
    tensors: dict[str, GGUFTensorInfo] = {}
    hashes: dict[str, str] = {}
    for index, split_path in enumerate(_split_paths(path)):
        header = _HeaderReader(split_path).header()
        keys |= header.keys if index == 0 else {}
        if duplicates := set(tensors) & set(header.tensors):
            error = f"{split_path} contains {sorted(duplicates)[0]}, which another split contains too"
            raise SourceError(error, hint="download the splits again")
        tensors |= header.tensors
        hashes |= header.hashes
    header = GGUFHeader(keys, tensors, hashes)
    _check_splits(path, header)
    return header


def _check_splits(path: Path, header: GGUFHeader) -> None:
    """Compare what the first split says about all of them with what was found. Raises SourceError."""
    files, tensors = header.get("split.count") or 1, header.get("split.tensors.count")
    if files != len(header.hashes):
        text = f"{path} is one of {files} splits, but {len(header.hashes)} was found by its name"
        raise SourceError(text, hint="name them as llama-gguf-split does: NAME-00001-of-00002.gguf")
    if files > 1 and tensors != len(header.tensors):
        text = f"the splits of {path} contain {len(header.tensors)} tensors, but the first says {tensors}"
        raise SourceError(text, hint="download all splits again")


def _split_paths(path: Path) -> list[Path]:
    """The file itself, or all splits of the model that it is a split of."""
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    paths = [path.with_name(f"{stem}-{index + 1:05d}-of-{count}.gguf") for index in range(int(count))]
    if missing := [split_path.name for split_path in paths if not split_path.is_file()]:
        raise SourceError(f"{path.parent} lacks {missing[0]}, a split of {stem}", hint="download all splits")
    return paths


class _HeaderReader:
    """Reads the header of one file from its start; checks every count against the file's size."""

    def __init__(self, path: Path) -> None:
        check_is_file(str(path))
        self.path = path
        self.file = DiskFile(path)
        self.digest = hashlib.sha256()

    def header(self) -> GGUFHeader:
        try:
            with open(self.path, "rb") as self.stream:  # type: BinaryIO
                return self._header()
        except (struct.error, UnicodeDecodeError, OSError) as error:
            raise SourceError(f"{self.path} cannot be read as GGUF: {error}", hint="download it again") from None

    def _header(self) -> GGUFHeader:
        if self._bytes(4) != b"GGUF":
            raise SourceError(f"{self.path} is not a GGUF file")
        (version,) = self._numbers("<I")
        if version not in (2, 3):
            raise SourceError(f"{self.path} is GGUF version {version}; only versions 2 and 3 are supported")
        tensor_count, key_count = self._numbers("<QQ")
        values = {}
        for _ in range(self._count(key_count)):
            name = self._string()
            if name in values:
                raise SourceError(f"{self.path} contains the key {name} twice", hint="download it again")
            values[name] = self._value(*self._numbers("<I"))
        entries = [self._entry() for _ in range(self._count(tensor_count))]
        names = [name for name, *_ in entries]
        if len(set(names)) < len(names):
            name = next(name for index, name in enumerate(names) if name in names[:index])
            raise SourceError(f"{self.path} contains the tensor {name} twice", hint="download it again")
        alignment = values["general.alignment"].value if "general.alignment" in values else 32
        if not isinstance(alignment, int) or not 0 < alignment < 1 << 20:
            raise SourceError(f"{self.path}: general.alignment is {alignment!r}; the file is damaged")
        start = -(-self.stream.tell() // alignment) * alignment
        tensors = {name: self._tensor(name, shape, number, start + offset) for name, shape, number, offset in entries}
        return GGUFHeader(values, tensors, {self.path.name: self.digest.hexdigest()})

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensorInfo:
        ggml_type, block, nbytes = self._type(name, number)
        if shape[-1] % block:
            raise SourceError(f"{self.path}: {name} has {shape[-1]} columns, which are not whole blocks of {ggml_type}")
        tensor = GGUFTensorInfo(name, shape, ggml_type, block, nbytes, self.file, offset)
        if offset + tensor.nbytes > self.file.size:
            raise SourceError(f"{self.path} is truncated: {name} extends beyond its end", hint="download it again")
        return tensor

    def _type(self, name: str, number: int) -> tuple[str, int, int]:
        """Name, block and bytes of a block of a tensor's type; the newest are not in every gguf package."""
        import gguf

        for quant_type in QUANT_TYPES.values():
            if quant_type.number == number:
                return quant_type.name, quant_type.block, quant_type.nbytes
        try:
            ggml_type = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise SourceError(f"{self.path}: {name} has the unknown type {number}") from None
        return (ggml_type.name, *gguf.GGML_QUANT_SIZES[ggml_type])

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        if not is_utf8(name):
            raise SourceError(f"{self.path}: the tensor name {name!r} is not UTF-8", hint="download it again")
        (dims,) = self._numbers("<I")
        if not 1 <= dims <= 4:
            raise SourceError(f"{self.path}: {name} has {dims} dimensions")
        shape = tuple(reversed(self._numbers(f"<{dims}Q")))
        if not all(0 < size < 1 << 40 for size in shape) or math.prod(shape) > 1 << 50:
            raise SourceError(f"{self.path}: {name} has the shape {list(shape)}")
        number, offset = self._numbers("<IQ")
        return name, shape, number, offset

    def _value(self, number: int) -> Value:
        if number not in _KIND_BY_NUMBER:
            raise SourceError(f"{self.path} contains a value of the unknown type {number}")
        kind, form = _KIND_BY_NUMBER[number]
        if kind == "string":
            return Value(kind, self._string())
        if kind != "array":
            return Value(kind, *self._numbers("<" + form))
        item_number, count = self._numbers("<IQ")
        items, form = _KIND_BY_NUMBER.get(item_number, ("", ""))
        if not items or items == "array":
            raise SourceError(f"{self.path} contains an array of the unsupported type {item_number}")
        count = self._count(count)
        values = tuple(self._string() for _ in range(count)) if items == "string" else self._numbers(f"<{count}{form}")
        return Value(kind, values, items)

    def _string(self) -> str:
        return self._bytes(self._count(*self._numbers("<Q"))).decode("utf-8", "surrogateescape")

    def _count(self, count: int) -> int:
        if count > min(LARGEST_COUNT, self.file.size):
            raise SourceError(f"{self.path}: a count in its header is {count}; the file is damaged")
        return count

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _bytes(self, count: int) -> bytes:
        if count > self.file.size:
            raise SourceError(f"{self.path}: its header is longer than the file")
        data = self.stream.read(count)
        self.digest.update(data)
        if len(data) < count:
            raise SourceError(f"{self.path} is truncated within its header", hint="download it again")
        return data
