"""GGUF files: header, key/values and tensor table are laid out before any weight is read.

Format: ggml/docs/gguf.md, version 3, little-endian. Offsets depend only on shapes and types, so rows can be written in
any order: a stack of experts is filled one expert at a time.
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
LARGEST_SCALE = 65504.0  # of F16; the scale of a block never exceeds its largest value
_FLOAT_TYPES = ("F32", "F16", "BF16")  # types without blocks, named as safetensors names them


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file: shape with the slowest dimension first; `content`: its bytes if already known."""

    name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    content: bytes = b""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.quant_type.row_nbytes(self.shape[-1])


def lay_out(stem: str, keys: Keys, tensors: Sequence[GGUFTensor], split_max_size: int = 0) -> Layout:
    """One file, or splits with at most `split_max_size` bytes of tensors each (0: one file), in the given order."""
    return lay_out_splits(stem, keys, _split(tensors, split_max_size))


def lay_out_splits(stem: str, keys: Keys, splits: Sequence[Sequence[GGUFTensor]]) -> Layout:
    """A file for each list of tensors.

    As gguf-py's GGUFWriter: the first split has all key/values, every split has split.*.
    """
    tensors = [tensor for split in splits for tensor in split]
    files: dict[str, OutputFile] = {}
    extents: dict[str, Extent] = {}
    for index, split in enumerate(splits):
        name = f"{stem}.gguf" if len(splits) == 1 else f"{stem}-{index + 1:05d}-of-{len(splits):05d}.gguf"
        split_keys = dict(keys) if index == 0 else {}
        if len(splits) > 1:
            count = Value("i32", len(tensors))
            split_keys |= {"split.no": u16(index), "split.count": u16(len(splits)), "split.tensors.count": count}
        head, offsets = header(split_keys, split), _offsets(split)
        for tensor, offset in zip(split, offsets, strict=True):
            extents[tensor.name] = Extent(name, len(head) + offset, tensor.nbytes)
        known = {extents[tensor.name].offset: tensor.content for tensor in split if tensor.content}
        files[name] = OutputFile(head, len(head) + sum(_padded(tensor.nbytes) for tensor in split), known)
    return Layout(files, extents)


def header(keys: Keys, tensors: Sequence[GGUFTensor]) -> bytes:
    """Everything before the tensor data, padded."""
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)) + encode_key_values(keys)
    table = b"".join(_entry(tensor, offset) for tensor, offset in zip(tensors, _offsets(tensors), strict=True))
    return (head + table).ljust(_padded(len(head) + len(table)), b"\0")


def _entry(tensor: GGUFTensor, offset: int) -> bytes:
    name = tensor.name.encode()
    dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", tensor.quant_type.number, offset)


def _offsets(tensors: Sequence[GGUFTensor]) -> list[int]:
    offsets, offset = [], 0
    for tensor in tensors:
        offsets.append(offset)
        offset += _padded(tensor.nbytes)
    return offsets


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _split(tensors: Sequence[GGUFTensor], max_size: int) -> list[list[GGUFTensor]]:
    splits: list[list[GGUFTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if max_size and splits[-1] and filled + tensor.nbytes > max_size:
            splits.append([])
            filled = 0
        splits[-1].append(tensor)
        filled += tensor.nbytes
    return splits


def row_positions(target: TensorTarget, info: TensorInfo) -> np.ndarray | None:
    """The unit of the target that each stored row becomes (int32; -1: none); None if the rows keep their order.

    Layers share it, because a stack of experts has some hundred thousand rows.
    """
    import numpy as np

    if target.rows is None or target.transpose:
        return None
    positions = np.full(info.rows, -1, dtype=np.int32)
    positions[target.rows] = np.arange(len(target.rows))
    return positions


@dataclass(frozen=True, eq=False)
class GGUFEncoder:
    """Arranges the rows of a merged tensor and encodes them as one GGUF tensor, or as a part of one.

    `rounded_to`: dtype to which values are rounded first ("": none). `importance`: float32, one row of column weights
    per matrix of the GGUF tensor, or None. `positions`: see row_positions.
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
        return f"{self.file_type}/{self.target.tensor}/{self.target.first_element}"

    @property
    def label(self) -> str:
        return f"GGUF {self.quant_type.name}"

    @property
    def float_dtype(self) -> str:
        return self.quant_type.name if self.quant_type.name in _FLOAT_TYPES else ""

    @property
    def file(self) -> str:
        return self.extent.file

    @property
    def chunk_rows(self) -> int:
        if not self.target.transpose:
            return self.info.block_rows
        return min(math.lcm(self.info.block_rows, self._source_rows), self.info.rows)

    @property
    def row_nbytes(self) -> int:
        if self.target.transpose:
            return -(-self._columns * self._unit_nbytes // self._source_rows)
        return self._unit_nbytes

    @property
    def scratch_nbytes(self) -> int:
        chunk = self.chunk_rows * self.info.columns * 4
        arranged = 3 if self.target.transpose else 1 if self.target.rows is not None else 0
        arranged += self.target.column_order is not None
        changed = self.target.add or self.target.factors or self.target.negative_exp or self.target.softplus
        changed = changed or self.target.centered
        rounded = bool(self.rounded_to or changed)
        result = self.chunk_rows * self.row_nbytes if self.quant_type.block > 1 else 0
        return (arranged + rounded) * chunk + result + scratch_nbytes(self.quant_type, self.device)

    def chunk_nbytes(self, start: int, stop: int) -> int:
        return len(self._units(start, stop)) * self._unit_nbytes

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        units, size = self._units(start, stop), self._unit_nbytes
        if isinstance(units, range):
            return [(self.extent.offset + units.start * size, len(units) * size)] if units else []
        return list(coalesce_ranges((self.extent.offset + int(unit) * size, size) for unit in units))

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        values = self._arranged(rows.float(), start)
        if self.target.centered:
            values = self._centered(values)
        if self.rounded_to:
            values = values.to(torch_dtype(self.rounded_to)).float()
        values = self._changed(values)
        if self.float_dtype:
            dtype = torch_dtype(self.float_dtype)
            assert dtype is not None
            values = values if values.device.type == "cpu" else values.to(dtype)
            into.view(dtype).view(values.shape).copy_(values, non_blocking=True)
            return
        for matrix_rows, out, importance in self._matrices(values.contiguous(), into, start, start + len(rows)):
            out.copy_(encode(self.quant_type, matrix_rows, importance).view(-1), non_blocking=True)

    def overflows(self, magnitude: float) -> bool:
        return not (
            magnitude < OVERFLOW_THRESHOLD[self.float_dtype] if self.float_dtype else magnitude <= LARGEST_SCALE
        )

    # Each stored row becomes a unit of the GGUF tensor: a whole row, or one element of a 1-D tensor.

    @property
    def _unit_columns(self) -> int:
        if self.target.column_order is not None:
            return len(self.target.column_order)
        return self.target.transpose or self.info.columns

    @property
    def _unit_nbytes(self) -> int:
        return self.quant_type.row_nbytes(self._unit_columns)

    @property
    def _first_unit(self) -> int:
        return self.target.first_element // self._unit_columns

    @property
    def _columns(self) -> int:
        """Columns that are selected before a matrix is transposed: rows of the transposed matrix."""
        return len(range(*self._column_slice.indices(self.info.columns)))

    @property
    def _column_slice(self) -> slice:
        return self.target.columns or slice(None)

    @property
    def _source_rows(self) -> int:
        """Stored rows that make up one transposed matrix."""
        if self.target.rows is None:
            return self.target.transpose
        return self.info.rows * self.target.transpose // len(self.target.rows)

    @cached_property
    def _positions(self) -> np.ndarray:
        positions = row_positions(self.target, self.info) if self.positions is None else self.positions
        assert positions is not None
        return positions

    def _units(self, start: int, stop: int) -> range | np.ndarray:
        """The units of the GGUF tensor that stored rows [start, stop) become, ascending."""
        import numpy as np

        if self.target.transpose:
            first, last = start // self._source_rows, stop // self._source_rows
            return range(self._first_unit + first * self._columns, self._first_unit + last * self._columns)
        if self.target.rows is None:
            return range(self._first_unit + start, self._first_unit + stop)
        positions: np.ndarray = np.sort(self._positions[start:stop])
        return self._first_unit + positions[np.searchsorted(positions, 0) :].astype(np.int64)

    def _arranged(self, values: Tensor, start: int) -> Tensor:
        """The rows of a chunk in the order of the GGUF tensor."""
        import numpy as np
        import torch

        stop = start + len(values)
        if self.target.transpose:
            return self._transposed(values, start)
        if self.target.column_order is not None:
            values = values.index_select(1, torch.from_numpy(self.target.column_order).to(values.device))
        if self.target.rows is None:
            return values
        positions = self._positions[start:stop]
        order = np.argsort(positions, kind="stable")[np.count_nonzero(positions < 0) :]
        if len(order) == len(values) and (np.diff(order) == 1).all():
            return values
        return values.index_select(0, torch.from_numpy(order).to(values.device))

    def _centered(self, values: Tensor) -> Tensor:
        """Minus their mean, in the stored dtype as in the converter; on the CPU, whose order of summation it has."""
        stored = values.cpu().to(torch_dtype(self.rounded_to or "F32"))
        return (stored - stored.mean()).float().to(values.device)

    def _changed(self, values: Tensor) -> Tensor:
        import torch

        for factor in self.target.factors:
            values = values * factor
        if self.target.add:
            values = values + self.target.add
        # on the CPU, because the last bit of exp differs between devices
        if self.target.softplus:
            return torch.nn.functional.softplus(values.cpu()).to(values.device)
        return values.cpu().exp().neg().to(values.device) if self.target.negative_exp else values

    def _transposed(self, values: Tensor, start: int) -> Tensor:
        import torch

        turn, source = self.target.transpose, self._source_rows
        if self.target.rows is not None:
            first, last = start // source * turn, (start + len(values)) // source * turn
            indices = torch.from_numpy(self.target.rows[first:last] - start).to(values.device)
            values = values.index_select(0, indices)
        matrices = values.view(-1, turn, values.shape[1])[:, :, self._column_slice]
        return matrices.transpose(1, 2).reshape(-1, turn)

    def _matrices(
        self, values: Tensor, into: Tensor, start: int, stop: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The rows of each matrix, the bytes to write them to, and the matrix's column weights."""
        size = self._unit_nbytes
        if self.importance is None or len(self.importance) == 1:
            weights = None if self.importance is None else self.importance[0].to(values.device)
            yield values, into, weights
            return
        import numpy as np

        matrix = np.asarray(self._units(start, stop)) // self.target.shape[-2]
        for number in np.unique(matrix):
            first, last = (int(index) for index in np.searchsorted(matrix, [number, number + 1]))
            yield values[first:last], into[first * size : last * size], self.importance[int(number)].to(values.device)
