"""Formats that stand transposed: a row of the tensor is a column of what is stored.

GPTQ and AWQ hold (in, out) where a checkpoint has (out, in); gpt-oss's MXFP4 experts hold (out, in) where
it has (in, out). A tile needs some columns of every stored row. The stored rows are read in order, a
megabyte at a time, and only those columns are kept; the page cache keeps the rest for the next tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.checkpoints.quantized.tensor import PIECE, Pieces, live
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.quant_codecs import mxfp4, packed_int32
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker, view_rows
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

STRIP = 1 << 20  # bytes that are read at a time
TEMPORARIES = 4  # of a piece: codes, zero points or scales for each of them, values


@dataclass(frozen=True, eq=False)
class Words:
    """GPTQ's and AWQ's tensors; `bits` of a weight. The tensor is (out, in).

    codes (in * bits / 32, out) for GPTQ, (in, out / 8) for AWQ; zeros (groups, out * bits / 32); scales
    (groups, out). `groups`: the group of each input; None: equally many inputs follow one another.
    `zeros_less`: the stored zero points are one too small.
    """

    about: str
    codes: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    groups: StoredTensor | None
    bits: int
    zeros_less: bool
    awq: bool

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.codes, self.zeros, self.scales, *([self.groups] if self.groups else []))

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        inputs, groups = self.codes.info.rows, self.scales.info.rows
        words_row = inputs * 4 // self.per_word if self.awq else inputs * 4
        row = words_row + -(-groups * 4 // self.per_word) + groups * self.scales.info.bits // 8
        edges = 2 * 4 * ((inputs if self.awq else 0) + groups)
        small = self.groups.info.nbytes if self.groups else 0
        wide = info.block_rows + 2 * self.per_word  # a block's edges may lie inside words
        many = live(TEMPORARIES, max(PIECE, self.per_word * wide) * wide // info.block_rows, info)
        scaling = live(4, groups * wide, info)
        return MemoryCost(
            row_nbytes=row,
            fixed_nbytes=edges + small + _strips(self.codes, self.zeros, self.scales) + 8 * ALIGNMENT,
            scratch_blocks=many + scaling,
        )

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> Pieces:
        coarse = range(rows.start // self.per_word, -(-rows.stop // self.per_word))
        codes = columns(self.codes, coarse if self.awq else rows, worker, last=rows.stop == info.rows)
        zeros = columns(self.zeros, coarse, worker)
        scales = columns(self.scales, rows, worker)
        groups = self._groups(info, worker)
        places = packed_int32.AWQ_PLACES if self.awq else ()

        def pieces(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            some = slice(start // self.per_word - coarse.start, -(-stop // self.per_word) - coarse.start)
            fine = slice(start % self.per_word, start % self.per_word + stop - start)
            mine = slice(start - rows.start, stop - rows.start)
            zero = packed_int32.split(zeros[:, some], self.bits, places)[:, fine]
            if self.zeros_less:
                zero = packed_int32.one_more(zero, self.bits)
            scale = scales[:, mine].float()
            step = max(PIECE // (stop - start) // self.per_word, 1) * self.per_word
            for at in range(0, info.columns, step):
                if self.awq:
                    code = packed_int32.split(codes[at : at + step, some], self.bits, places)[:, fine]
                else:
                    code = packed_int32.split_down(
                        codes[at // self.per_word : (at + step) // self.per_word, mine], self.bits
                    )
                inputs = slice(at, at + len(code))
                yield (slice(None), inputs), packed_int32.from_steps(code, zero, scale, groups[inputs]).t()

        return pieces

    def _groups(self, info: TensorInfo, worker: Worker) -> Tensor:
        import torch

        if self.groups is not None:
            return self.groups.read_all(worker).flatten()
        inputs, groups = info.columns, self.scales.info.rows
        return torch.arange(inputs, dtype=torch.int32, device=worker.device) // -(-inputs // groups)


@dataclass(frozen=True, eq=False)
class Experts:
    """gpt-oss's experts: codes (experts, out, groups, 16), exponents (experts, out, groups), both bytes.

    The tensor is (experts, in, out): its rows are inputs, 32 of which are a group.
    """

    about: str
    codes: StoredTensor
    exponents: StoredTensor

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.codes, self.exponents)

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        experts, _, outputs = info.shape
        group = outputs * (mxfp4.GROUP // 2 + 1)
        fixed = 2 * group + 3 * ALIGNMENT * (experts + 2) + _strips(_by_output(self.codes), _by_output(self.exponents))
        piece = max(PIECE, outputs * mxfp4.GROUP)
        return MemoryCost(row_nbytes=-(-group // mxfp4.GROUP), fixed_nbytes=fixed, scratch_blocks=live(2, piece, info))

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> Pieces:
        _, inputs, outputs = info.shape
        codes, exponents = _by_output(self.codes), _by_output(self.exponents)
        staged = {}
        for expert in range(rows.start // inputs, -(-rows.stop // inputs)):
            some = _groups_of(rows, expert, inputs)
            lines = range(expert * outputs, (expert + 1) * outputs)
            packed = columns(
                codes, range(some.start * 16, some.stop * 16), worker, lines, last=some.stop * 32 >= inputs
            )
            powers = columns(exponents, some, worker, lines)
            staged[expert] = (some.start, packed, powers)

        step = max(PIECE // (outputs * mxfp4.GROUP), 1)

        def pieces(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for expert in range(start // inputs, -(-stop // inputs)):
                first, packed, powers = staged[expert]
                some = _groups_of(range(start, stop), expert, inputs)
                for group in range(some.start, some.stop, step):
                    here = range(group - first, min(group + step, some.stop) - first)
                    values = mxfp4.dequantise(
                        packed[:, here.start * 16 : here.stop * 16], powers[:, here.start : here.stop]
                    )
                    begin = expert * inputs + group * mxfp4.GROUP  # the row that the values begin with
                    low, high = max(begin, start), min(begin + values.shape[1], stop)
                    yield (slice(low - start, high - start), slice(None)), values[:, low - begin : high - begin].t()

        return pieces


def columns(
    stored: StoredTensor, wanted: range, worker: Worker, lines: range | None = None, *, last: bool = False
) -> Tensor:
    """Columns `wanted` of the stored rows `lines` (all), staged: (rows, columns) in the stored dtype.

    `last`: nobody needs the other columns after this.
    """
    lines = lines or range(stored.info.rows)
    size = stored.info.bits // 8
    nbytes = len(lines) * len(wanted) * size

    def make() -> Tensor:
        piece, there = worker.allocate_tensor(nbytes)
        _gather(stored, wanted, lines, piece, worker, keep=not last)
        return there if there is piece else there.copy_(piece, non_blocking=True)

    raw = worker.cached((stored.file.path, stored.offset, wanted, lines), make)
    return view_rows(raw, stored.info.dtype, len(wanted))


def _gather(stored: StoredTensor, wanted: range, lines: range, into: Tensor, worker: Worker, *, keep: bool) -> None:
    size, row = stored.info.bits // 8, stored.info.row_nbytes
    if len(wanted) == stored.info.columns:
        stored.file.read_into(into.numpy().data, stored.offset + lines.start * row, keep=keep)
        return
    strip = worker.cached(("strip", max(row, STRIP)), lambda: worker.allocate(max(row, STRIP)))
    kept = into.numpy().reshape(len(lines), -1)
    step = max(len(strip) // row, 1)
    for at in range(0, len(lines), step):
        count = min(step, len(lines) - at)
        part = strip[: count * row]
        stored.file.read_into(part.data, stored.offset + (lines.start + at) * row, keep=keep)
        kept[at : at + count] = part.reshape(count, row)[:, wanted.start * size : wanted.stop * size]


def _strips(*every: StoredTensor) -> int:
    """Bytes of the strips that gathering columns takes."""
    return STRIP + sum(one.info.row_nbytes for one in every if one.info.row_nbytes > STRIP)


def _by_output(stored: StoredTensor) -> StoredTensor:
    """Codes or exponents as a matrix of bytes with a row for each output of each expert."""
    experts, outputs, *rest = stored.info.shape
    width = 1
    for one in rest:
        width *= one
    return StoredTensor(TensorInfo(stored.info.name, "U8", (experts * outputs, width)), stored.file, stored.offset)


def _groups_of(rows: range, expert: int, inputs: int) -> range:
    """The groups that hold an expert's inputs among the rows."""
    begin = max(rows.start - expert * inputs, 0)
    end = min(rows.stop - expert * inputs, inputs)
    return range(begin // mxfp4.GROUP, -(-end // mxfp4.GROUP))
