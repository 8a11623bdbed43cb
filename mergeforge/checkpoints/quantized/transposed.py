"""Formats that are stored transposed: a row of the tensor is a column of the stored one.

GPTQ and AWQ store (in, out) where a checkpoint has (out, in); gpt-oss's MXFP4 experts are stored as (out, in) where it
has (in, out). A tile needs some columns of every stored row. The stored rows are read in order, a megabyte at a time,
and only those columns are kept; the page cache keeps the rest for the next tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.checkpoints.quantized.tensor import CHUNK_ELEMENTS, DequantizedChunks, scratch_blocks
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.quant_codecs import fp4, integers
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker, view_rows

if TYPE_CHECKING:
    from torch import Tensor

READ_NBYTES = 1 << 20  # bytes that are read at a time
TEMPORARIES = 4  # of a chunk: codes, zero points or scales per code, values


@dataclass(frozen=True, eq=False)
class PackedInt32Layout:
    """GPTQ's and AWQ's tensors with `bits` per weight. The tensor is (out, in).

    codes: (in * bits / 32, out) for GPTQ, (in, out / 8) for AWQ; zeros: (groups, out * bits / 32); scales: (groups,
    out). `groups`: the group of each input (None: groups of equal size, in order). `zeros_minus_one`: the stored zero
    points are one too small.
    """

    label: str
    codes: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    groups: StoredTensor | None
    bits: int
    zeros_minus_one: bool
    awq: bool

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.codes, self.zeros, self.scales, *([self.groups] if self.groups else []))

    @property
    def values_per_word(self) -> int:
        return 32 // self.bits

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        inputs, groups = self.codes.info.rows, self.scales.info.rows
        codes_nbytes = inputs * 4 // self.values_per_word if self.awq else inputs * 4
        row_nbytes = codes_nbytes + -(-groups * 4 // self.values_per_word) + groups * self.scales.info.bits // 8
        edge_nbytes = 2 * 4 * ((inputs if self.awq else 0) + groups)
        groups_nbytes = self.groups.info.nbytes if self.groups else 0
        width = info.block_rows + 2 * self.values_per_word  # the edges of a block may be inside words
        unpacking = scratch_blocks(
            TEMPORARIES, max(CHUNK_ELEMENTS, self.values_per_word * width) * width // info.block_rows, info
        )
        scaling = scratch_blocks(4, groups * width, info)
        return MemoryCost(
            row_nbytes=row_nbytes,
            fixed_nbytes=edge_nbytes
            + groups_nbytes
            + _read_buffer_nbytes(self.codes, self.zeros, self.scales)
            + 8 * ALIGNMENT,
            scratch_blocks=unpacking + scaling,
        )

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> DequantizedChunks:
        words = range(rows.start // self.values_per_word, -(-rows.stop // self.values_per_word))
        codes = load_columns(self.codes, words if self.awq else rows, worker, last=rows.stop == info.rows)
        zeros = load_columns(self.zeros, words, worker)
        scales = load_columns(self.scales, rows, worker)
        groups = self._groups(info, worker)
        order = integers.AWQ_ORDER if self.awq else ()

        def chunks(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            block_words = slice(
                start // self.values_per_word - words.start, -(-stop // self.values_per_word) - words.start
            )
            in_words = slice(start % self.values_per_word, start % self.values_per_word + stop - start)
            block_rows = slice(start - rows.start, stop - rows.start)
            zero = integers.unpack_rows(zeros[:, block_words], self.bits, order)[:, in_words]
            if self.zeros_minus_one:
                zero = integers.gptq_zero_point_offset(zero, self.bits)
            scale = scales[:, block_rows].float()
            step = max(CHUNK_ELEMENTS // (stop - start) // self.values_per_word, 1) * self.values_per_word
            for column in range(0, info.columns, step):
                if self.awq:
                    code = integers.unpack_rows(codes[column : column + step, block_words], self.bits, order)[
                        :, in_words
                    ]
                else:
                    code = integers.unpack_columns(
                        codes[column // self.values_per_word : (column + step) // self.values_per_word, block_rows],
                        self.bits,
                    )
                inputs = slice(column, column + len(code))
                yield (slice(None), inputs), integers.dequantize_gptq_awq(code, zero, scale, groups[inputs]).t()

        return chunks

    def _groups(self, info: TensorInfo, worker: Worker) -> Tensor:
        import torch

        if self.groups is not None:
            return self.groups.read_all(worker).flatten()
        inputs, groups = info.columns, self.scales.info.rows
        return torch.arange(inputs, dtype=torch.int32, device=worker.device) // -(-inputs // groups)


@dataclass(frozen=True, eq=False)
class MXFP4ExpertsLayout:
    """gpt-oss's experts: codes (experts, out, groups, 16) and exponents (experts, out, groups), both bytes.

    The tensor is (experts, in, out): its rows are inputs, and 32 of them are a group.
    """

    label: str
    codes: StoredTensor
    exponents: StoredTensor

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.codes, self.exponents)

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        experts, _, outputs = info.shape
        group_nbytes = outputs * (fp4.MXFP4_GROUP // 2 + 1)
        fixed_nbytes = (
            2 * group_nbytes
            + 3 * ALIGNMENT * (experts + 2)
            + _read_buffer_nbytes(_by_output(self.codes), _by_output(self.exponents))
        )
        chunk = max(CHUNK_ELEMENTS, outputs * fp4.MXFP4_GROUP)
        return MemoryCost(
            row_nbytes=-(-group_nbytes // fp4.MXFP4_GROUP),
            fixed_nbytes=fixed_nbytes,
            scratch_blocks=scratch_blocks(2, chunk, info),
        )

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> DequantizedChunks:
        _, inputs, outputs = info.shape
        codes, exponents = _by_output(self.codes), _by_output(self.exponents)
        loaded = {}
        for expert in range(rows.start // inputs, -(-rows.stop // inputs)):
            groups = _groups_of(rows, expert, inputs)
            stored_rows = range(expert * outputs, (expert + 1) * outputs)
            packed = load_columns(
                codes, range(groups.start * 16, groups.stop * 16), worker, stored_rows, last=groups.stop * 32 >= inputs
            )
            powers = load_columns(exponents, groups, worker, stored_rows)
            loaded[expert] = (groups.start, packed, powers)

        step = max(CHUNK_ELEMENTS // (outputs * fp4.MXFP4_GROUP), 1)

        def chunks(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for expert in range(start // inputs, -(-stop // inputs)):
                first, packed, powers = loaded[expert]
                groups = _groups_of(range(start, stop), expert, inputs)
                for group in range(groups.start, groups.stop, step):
                    part = range(group - first, min(group + step, groups.stop) - first)
                    values = fp4.dequantize_mxfp4(
                        packed[:, part.start * 16 : part.stop * 16], powers[:, part.start : part.stop]
                    )
                    begin = expert * inputs + group * fp4.MXFP4_GROUP  # the row that the values start with
                    low, high = max(begin, start), min(begin + values.shape[1], stop)
                    yield (slice(low - start, high - start), slice(None)), values[:, low - begin : high - begin].t()

        return chunks


def load_columns(
    stored: StoredTensor, columns: range, worker: Worker, rows: range | None = None, *, last: bool = False
) -> Tensor:
    """Load columns of the stored `rows` (default: all) as (rows, columns) in the stored dtype.

    `last`: no later tile needs the other columns.
    """
    rows = rows or range(stored.info.rows)
    size = stored.info.bits // 8
    nbytes = len(rows) * len(columns) * size

    def make() -> Tensor:
        host, on_device = worker.allocate_tensor(nbytes)
        _read_columns(stored, columns, rows, host, worker, keep=not last)
        return on_device if on_device is host else on_device.copy_(host, non_blocking=True)

    raw = worker.cached((stored.file.path, stored.offset, columns, rows), make)
    return view_rows(raw, stored.info.dtype, len(columns))


def _read_columns(
    stored: StoredTensor, columns: range, rows: range, out: Tensor, worker: Worker, *, keep: bool
) -> None:
    size, row_nbytes = stored.info.bits // 8, stored.info.row_nbytes
    if len(columns) == stored.info.columns:
        stored.file.read_into(out.numpy().data, stored.offset + rows.start * row_nbytes, keep=keep)
        return
    buffer_nbytes = max(row_nbytes, READ_NBYTES)
    buffer = worker.cached(("read buffer", buffer_nbytes), lambda: worker.allocate(buffer_nbytes))
    selected = out.numpy().reshape(len(rows), -1)
    step = max(len(buffer) // row_nbytes, 1)
    for first in range(0, len(rows), step):
        count = min(step, len(rows) - first)
        part = buffer[: count * row_nbytes]
        stored.file.read_into(part.data, stored.offset + (rows.start + first) * row_nbytes, keep=keep)
        selected[first : first + count] = part.reshape(count, row_nbytes)[:, columns.start * size : columns.stop * size]


def _read_buffer_nbytes(*tensors: StoredTensor) -> int:
    """The size of the buffers that reading columns of the tensors takes."""
    return READ_NBYTES + sum(stored.info.row_nbytes for stored in tensors if stored.info.row_nbytes > READ_NBYTES)


def _by_output(stored: StoredTensor) -> StoredTensor:
    """View codes or exponents as a matrix of bytes with one row per output of each expert."""
    experts, outputs, *rest = stored.info.shape
    width = math.prod(rest)
    return StoredTensor(TensorInfo(stored.info.name, "U8", (experts * outputs, width)), stored.file, stored.offset)


def _groups_of(rows: range, expert: int, inputs: int) -> range:
    """The groups that hold the inputs of an expert within the rows."""
    begin = max(rows.start - expert * inputs, 0)
    end = min(rows.stop - expert * inputs, inputs)
    return range(begin // fp4.MXFP4_GROUP, -(-end // fp4.MXFP4_GROUP))
