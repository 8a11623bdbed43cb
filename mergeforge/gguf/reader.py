"""The header of a GGUF file (and of its splits), read strictly.

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
from mergeforge.gguf.key_values import KINDS, Value
from mergeforge.io.disk import DiskFile, InputFile
from mergeforge.io.safetensors_header import require_regular

LARGEST_COUNT = 1 << 28  # of keys, tensors, items and characters: far above any model's
_KIND_OF = {number: (kind, form) for kind, (number, form) in KINDS.items()}
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensorInfo:
    """A tensor in a GGUF file: shape with the slowest dimension first, ggml type, absolute offset, bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    block: int
    block_nbytes: int
    file: InputFile
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_nbytes

    def row_nbytes(self, columns: int) -> int:
        return columns // self.block * self.block_nbytes


@dataclass(frozen=True)
class GGUFHeader:
    """Key/values and tensors of a GGUF model, all of its files together; file name -> sha256 of its header."""

    keys: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensorInfo]
    hashes: Mapping[str, str]

    def get(self, key: str) -> Any:
        return self.keys[key].value if key in self.keys else None


def read_gguf(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file, and of its other splits; no tensor is read.

    Raises SourceError that names the file and what is wrong.
    """
    keys: dict[str, Value] = {}
    tensors: dict[str, GGUFTensorInfo] = {}
    hashes: dict[str, str] = {}
    for at, part in enumerate(_parts(path)):
        header = _Reader(part).header()
        keys |= header.keys if at == 0 else {}
        if twice := set(tensors) & set(header.tensors):
            raise SourceError(f"{part} holds {sorted(twice)[0]}, which another part holds too")
        tensors |= header.tensors
        hashes |= header.hashes
    return GGUFHeader(keys, tensors, hashes)


def _parts(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    parts = [path.with_name(f"{stem}-{at + 1:05d}-of-{count}.gguf") for at in range(int(count))]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise SourceError(f"{path.parent} lacks {missing[0]}, a part of {stem}")
    return parts


class _Reader:
    """Reads one file's header from its start; every count is checked against the file's size."""

    def __init__(self, path: Path) -> None:
        require_regular(str(path))
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
            raise SourceError(f"{self.path} is GGUF version {version}; 2 and 3 can be read")
        tensors, keys = self._numbers("<QQ")
        values = {}
        for _ in range(self._count(keys)):
            name = self._text()
            values[name] = self._value(*self._numbers("<I"))
        entries = [self._entry() for _ in range(self._count(tensors))]
        alignment = values["general.alignment"].value if "general.alignment" in values else 32
        if not isinstance(alignment, int) or not 0 < alignment < 1 << 20:
            raise SourceError(f"{self.path}: general.alignment is {alignment!r}; the file is damaged")
        start = -(-self.stream.tell() // alignment) * alignment
        held = {name: self._held(name, shape, kind, start + offset) for name, shape, kind, offset in entries}
        return GGUFHeader(values, held, {self.path.name: self.digest.hexdigest()})

    def _held(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensorInfo:
        import gguf

        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise SourceError(f"{self.path}: {name} has the unknown type {number}") from None
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise SourceError(f"{self.path}: {name} has {shape[-1]} columns, which {kind.name} cannot hold")
        held = GGUFTensorInfo(name, shape, kind.name, block, nbytes, self.file, offset)
        if offset + held.nbytes > self.file.size:
            raise SourceError(f"{self.path} is cut off: {name} lies beyond its end", hint="download it again")
        return held

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dims,) = self._numbers("<I")
        if not 1 <= dims <= 4:
            raise SourceError(f"{self.path}: {name} has {dims} dimensions")
        shape = tuple(reversed(self._numbers(f"<{dims}Q")))
        if not all(0 < size < 1 << 40 for size in shape) or math.prod(shape) > 1 << 50:
            raise SourceError(f"{self.path}: {name} has the shape {list(shape)}")
        kind, offset = self._numbers("<IQ")
        return name, shape, kind, offset

    def _value(self, number: int) -> Value:
        if number not in _KIND_OF:
            raise SourceError(f"{self.path} holds a value of the unknown type {number}")
        kind, form = _KIND_OF[number]
        if kind == "text":
            return Value(kind, self._text())
        if kind != "array":
            return Value(kind, *self._numbers("<" + form))
        item, count = self._numbers("<IQ")
        items, form = _KIND_OF.get(item, ("", ""))
        if not items or items == "array":
            raise SourceError(f"{self.path} holds an array of the type {item}")
        count = self._count(count)
        values = tuple(self._text() for _ in range(count)) if items == "text" else self._numbers(f"<{count}{form}")
        return Value(kind, values, items)

    def _text(self) -> str:
        return self._bytes(self._count(*self._numbers("<Q"))).decode("utf-8", "surrogateescape")

    def _count(self, count: int) -> int:
        if count > min(LARGEST_COUNT, self.file.size):
            raise SourceError(f"{self.path}: its header counts {count} of something; the file is damaged")
        return count

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _bytes(self, count: int) -> bytes:
        if count > self.file.size:
            raise SourceError(f"{self.path}: its header is longer than the file")
        data = self.stream.read(count)
        self.digest.update(data)
        if len(data) < count:
            raise SourceError(f"{self.path} is cut off inside its header", hint="download it again")
        return data
