"""bitsandbytes' 4-bit tensors: blocks of codes over the flat tensor, so rows may begin inside one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.checkpoints.quantized.tensor import PIECE, Pieces, live, strips
from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.quant_codecs import nf4
from mergeforge.quant_codecs.packed_4bit import pair_table, unpack
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Rows
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEMPORARIES = 2  # of a piece: values, and bytes as integers, a scale for each, or the rounded values


@dataclass(frozen=True, eq=False)
class Nested:
    """Double quantisation: the magnitudes' 8-bit levels, the largest of each block of them, their mean."""

    levels: StoredTensor
    largest: StoredTensor
    offset: float


@dataclass(frozen=True, eq=False)
class FourBit:
    """Codes (two a byte, the high four bits first), the 16 levels, and a magnitude for each `block` of them."""

    about: str
    codes: StoredTensor
    levels: StoredTensor
    largest: StoredTensor
    block: int
    nested: Nested | None = None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        inner = (self.nested.levels, self.nested.largest) if self.nested else ()
        return (self.codes, self.levels, self.largest, *inner)

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        size = self.largest.info.bits // 8
        row = -(-info.columns // 2) + -(-info.columns * size // self.block)
        fixed = sum(one.info.nbytes for one in self.stored[1:] if one is not self.largest)
        return MemoryCost(
            row_nbytes=row,
            fixed_nbytes=fixed + 8 * ALIGNMENT,
            scratch_blocks=live(TEMPORARIES, max(PIECE, info.columns), info),
        )

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> Pieces:
        first, last = rows.start * info.columns, rows.stop * info.columns
        codes = _part(self.codes, first // 2, -(-last // 2), worker)
        blocks = range(first // self.block, -(-last // self.block))
        largest = self._magnitudes(blocks, worker)
        table = pair_table(self.levels.read_all(worker).flatten(), high_first=True)

        def pieces(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for at, upto, where in strips(start, stop, info.columns):
                begin, end = at * info.columns, upto * info.columns
                values = unpack(codes[begin // 2 - first // 2 : -(-end // 2) - first // 2], table)
                values = values[begin % 2 : begin % 2 + end - begin]
                here = largest(begin // self.block, -(-end // self.block))
                yield where, nf4.scaled(values, here, begin, self.block).view(upto - at, info.columns)

        return pieces

    def _magnitudes(self, blocks: range, worker: Worker) -> Rows:
        """What gives the magnitudes of some of the blocks, float32."""
        size = self.largest.info.bits // 8
        raw = _part(self.largest, blocks.start * size, blocks.stop * size, worker)
        if self.nested is None:
            plain = raw.view(_torch(self.largest))
            return lambda start, stop: plain[start - blocks.start : stop - blocks.start].float()
        levels = self.nested.levels.read_all(worker).flatten()
        tops = self.nested.largest.read_all(worker).flatten()
        offset = self.nested.offset

        def magnitudes(start: int, stop: int) -> Tensor:
            codes = raw[start - blocks.start : stop - blocks.start]
            return nf4.nested_scales(codes, levels, tops[start // nf4.NESTED :], offset, start)

        return magnitudes


def _torch(stored: StoredTensor) -> torch.dtype:
    known = torch_dtype(stored.info.dtype)
    assert known is not None
    return known


def _part(stored: StoredTensor, start: int, stop: int, worker: Worker) -> Tensor:
    """Bytes [start, stop) of a stored tensor."""
    return worker.read(stored.file, stored.offset + start, stop - start)
