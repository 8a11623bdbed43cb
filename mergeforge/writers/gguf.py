"""GGUF files: header, key/values and tensor table laid out before any weight is read.

Format: ggml/docs/gguf.md, version 3, little-endian. Offsets follow from shapes and types alone, so
rows are written at their place in any order: a stack of experts is filled one expert at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.gguf.architectures import TensorTarget
from mergeforge.gguf.key_values import Keys, Value, encode_key_values, u16
from mergeforge.gguf.quantize import QuantType, encode, scratch_nbytes
from mergeforge.io.file_layout import Extent, Layout, OutputFile
from mergeforge.writers.encoder import ByteRange, coalesce_ranges
from mergeforge.writers.safetensors import OVERFLOW_THRESHOLD

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
LARGEST_SCALE = 65504.0  # of an f16; a block's scale is never larger than its largest value
_PLAIN = ("F32", "F16", "BF16")  # types without blocks, named as safetensors names them


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file: shape with the slowest dimension first; `content` where it is known already."""

    name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    content: bytes = b""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.quant_type.row_nbytes(self.shape[-1])


def lay_out(stem: str, keys: Keys, tensors: Sequence[GGUFTensor], split_max_size: int = 0) -> Layout:
    """One file, or several of at most `split_max_size` bytes of tensors each (0: one), in the given order.

    As gguf-py's GGUFWriter splits: the first file has all key/values, each has split.*.
    """
    parts = _split(tensors, split_max_size)
    files: dict[str, OutputFile] = {}
    extents: dict[str, Extent] = {}
    for at, part in enumerate(parts):
        name = f"{stem}.gguf" if len(parts) == 1 else f"{stem}-{at + 1:05d}-of-{len(parts):05d}.gguf"
        own = dict(keys) if at == 0 else {}
        if len(parts) > 1:
            count = Value("i32", len(tensors))
            own |= {"split.no": u16(at), "split.count": u16(len(parts)), "split.tensors.count": count}
        head, offsets = header(own, part), _offsets(part)
        for tensor, offset in zip(part, offsets, strict=True):
            extents[tensor.name] = Extent(name, len(head) + offset, tensor.nbytes)
        known = {extents[tensor.name].offset: tensor.content for tensor in part if tensor.content}
        files[name] = OutputFile(head, len(head) + sum(_padded(tensor.nbytes) for tensor in part), known)
    return Layout(files, extents)


def header(keys: Keys, tensors: Sequence[GGUFTensor]) -> bytes:
    """Everything before the tensors' data, padded."""
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)) + encode_key_values(keys)
    table = b"".join(_entry(tensor, at) for tensor, at in zip(tensors, _offsets(tensors), strict=True))
    return (head + table).ljust(_padded(len(head) + len(table)), b"\0")


def _entry(tensor: GGUFTensor, offset: int) -> bytes:
    name = tensor.name.encode()
    dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", tensor.quant_type.number, offset)


def _offsets(tensors: Sequence[GGUFTensor]) -> list[int]:
    offsets, at = [], 0
    for tensor in tensors:
        offsets.append(at)
        at += _padded(tensor.nbytes)
    return offsets


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _split(tensors: Sequence[GGUFTensor], largest: int) -> list[list[GGUFTensor]]:
    parts: list[list[GGUFTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if largest and parts[-1] and filled + tensor.nbytes > largest:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.nbytes
    return parts


def row_positions(place: TensorTarget, info: TensorInfo) -> np.ndarray | None:
    """Which of the place's units each stored row becomes (int32; -1: none); None where rows stay in order.

    Layers share it: a stack of experts has some hundred thousand rows.
    """
    import numpy as np

    if place.rows is None or place.turn:
        return None
    positions = np.full(info.rows, -1, dtype=np.int32)
    positions[place.rows] = np.arange(len(place.rows))
    return positions


@dataclass(frozen=True, eq=False)
class GGUFEncoder:
    """A merged tensor's rows, arranged and encoded as (a part of) one GGUF tensor.

    `stored` names the dtype to which values are rounded first ("": none). `importance`: float32,
    one row of column weights for each matrix of the GGUF tensor, or None. `positions`: see positions_of.
    """

    file_type: str
    info: TensorInfo
    target: TensorTarget
    quant_type: QuantType
    extent: Extent
    device: str
    rounded_to: str = ""
    importance: Tensor | None = None
    positions: np.ndarray | None = None

    @property
    def key(self) -> str:
        return f"{self.file_type}/{self.target.tensor}/{self.target.first}"

    @property
    def label(self) -> str:
        return f"GGUF's {self.quant_type.name}"

    @property
    def float_dtype(self) -> str:
        return self.quant_type.name if self.quant_type.name in _PLAIN else ""

    @property
    def file(self) -> str:
        return self.extent.file

    @property
    def chunk_rows(self) -> int:
        if not self.target.turn:
            return self.info.block_rows
        return min(math.lcm(self.info.block_rows, self._source_rows), self.info.rows)

    @property
    def row_nbytes(self) -> int:
        if self.target.turn:
            return -(-self._columns * self._unit_nbytes // self._source_rows)
        return self._unit_nbytes

    @property
    def scratch_nbytes(self) -> int:
        strip = self.chunk_rows * self.info.columns * 4
        arranged = 3 if self.target.turn else 1 if self.target.rows is not None else 0
        rounded = bool(self.rounded_to or self.target.add)
        result = self.chunk_rows * self.row_nbytes if self.quant_type.block > 1 else 0
        return (arranged + rounded) * strip + result + scratch_nbytes(self.quant_type, self.device)

    def chunk_nbytes(self, start: int, stop: int) -> int:
        return len(self._targets(start, stop)) * self._unit_nbytes

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        targets, size = self._targets(start, stop), self._unit_nbytes
        if isinstance(targets, range):
            return [(self.extent.offset + targets.start * size, len(targets) * size)] if targets else []
        return list(coalesce_ranges((self.extent.offset + int(target) * size, size) for target in targets))

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        values = self._arranged(rows.float(), start)
        if self.rounded_to:
            values = values.to(torch_dtype(self.rounded_to)).float()
        if self.target.add:
            values = values + self.target.add
        if self.float_dtype:
            dtype = torch_dtype(self.float_dtype)
            assert dtype is not None
            values = values if values.device.type == "cpu" else values.to(dtype)
            into.view(dtype).view(values.shape).copy_(values, non_blocking=True)
            return
        for part, out, importance in self._matrices(values.contiguous(), into, start, start + len(rows)):
            out.copy_(encode(self.quant_type, part, importance).view(-1), non_blocking=True)

    def overflows(self, magnitude: float) -> bool:
        return not (magnitude < OVERFLOW_THRESHOLD[self.float_dtype] if self.float_dtype else magnitude <= LARGEST_SCALE)

    # Stored rows are units of the GGUF tensor: whole rows of it, or single elements of a 1-D one.

    @property
    def _unit_columns(self) -> int:
        return self.target.turn or self.info.columns

    @property
    def _unit_nbytes(self) -> int:
        return self.quant_type.row_nbytes(self._unit_columns)

    @property
    def _first(self) -> int:
        return self.target.first * self.target.shape[-1] // self._unit_columns

    @property
    def _columns(self) -> int:
        """Columns that are chosen before matrices are turned: rows of a turned matrix."""
        return len(range(*self._chosen.indices(self.info.columns)))

    @property
    def _chosen(self) -> slice:
        return self.target.columns or slice(None)

    @property
    def _source_rows(self) -> int:
        """Stored rows from which one turned matrix comes."""
        if self.target.rows is None:
            return self.target.turn
        return self.info.rows * self.target.turn // len(self.target.rows)

    @cached_property
    def _positions(self) -> np.ndarray:
        positions = row_positions(self.target, self.info) if self.positions is None else self.positions
        assert positions is not None
        return positions

    def _targets(self, start: int, stop: int) -> range | np.ndarray:
        """The GGUF tensor's units that stored rows [start, stop) become, ascending."""
        import numpy as np

        if self.target.turn:
            first, last = start // self._source_rows, stop // self._source_rows
            return range(self._first + first * self._columns, self._first + last * self._columns)
        if self.target.rows is None:
            return range(self._first + start, self._first + stop)
        found: np.ndarray = np.sort(self._positions[start:stop])
        return self._first + found[np.searchsorted(found, 0) :].astype(np.int64)

    def _arranged(self, values: Tensor, start: int) -> Tensor:
        """The strip's rows in the order of the GGUF tensor."""
        import numpy as np
        import torch

        stop = start + len(values)
        if self.target.turn:
            return self._turned(values, start)
        if self.target.rows is None:
            return values
        positions = self._positions[start:stop]
        order = np.argsort(positions, kind="stable")[np.count_nonzero(positions < 0) :]
        if len(order) == len(values) and (np.diff(order) == 1).all():
            return values
        return values.index_select(0, torch.from_numpy(order).to(values.device))

    def _turned(self, values: Tensor, start: int) -> Tensor:
        import torch

        turn, source = self.target.turn, self._source_rows
        if self.target.rows is not None:
            first, last = start // source * turn, (start + len(values)) // source * turn
            chosen = torch.from_numpy(self.target.rows[first:last] - start).to(values.device)
            values = values.index_select(0, chosen)
        matrices = values.view(-1, turn, values.shape[1])[:, :, self._chosen]
        return matrices.transpose(1, 2).reshape(-1, turn)

    def _matrices(
        self, values: Tensor, into: Tensor, start: int, stop: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows with the column weights of their matrix, and where their bytes go."""
        size = self._unit_nbytes
        if self.importance is None or len(self.importance) == 1:
            weights = None if self.importance is None else self.importance[0].to(values.device)
            yield values, into, weights
            return
        import numpy as np

        matrix = np.asarray(self._targets(start, stop)) // self.target.shape[-2]
        for one in np.unique(matrix):
            first, last = (int(at) for at in np.searchsorted(matrix, [one, one + 1]))
            yield values[first:last], into[first * size : last * size], self.importance[int(one)].to(values.device)
