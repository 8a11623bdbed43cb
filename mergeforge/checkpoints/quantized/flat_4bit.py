"""Flat4BitLayout: bitsandbytes' 4-bit tensors. Blocks cover the flat tensor, so a row may start inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.checkpoints.quantized.tensor import CHUNK_ELEMENTS, DequantizedChunks, row_chunks, scratch_blocks
from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.quant_codecs import nf4
from mergeforge.quant_codecs.fp4 import byte_table, unpack_4bit
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import Rows
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEMPORARIES = 2  # of a chunk: the values, and bytes as integers, one scale per value, or the rounded values


@dataclass(frozen=True, eq=False)
class DoubleQuant:
    """Double quantization of the absmax values: their 8-bit levels, the absmax of each block of them, their mean."""

    levels: StoredTensor
    absmax: StoredTensor
    offset: float


@dataclass(frozen=True, eq=False)
class Flat4BitLayout:
    """Codes (two per byte, high nibble first), the 16 levels, and one absmax per `block` of codes."""

    label: str
    codes: StoredTensor
    levels: StoredTensor
    absmax: StoredTensor
    block: int
    double_quant: DoubleQuant | None = None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        inner = (self.double_quant.levels, self.double_quant.absmax) if self.double_quant else ()
        return (self.codes, self.levels, self.absmax, *inner)

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        size = self.absmax.info.bits // 8
        row_nbytes = -(-info.columns // 2) + -(-info.columns * size // self.block)
        fixed_nbytes = sum(stored.info.nbytes for stored in self.stored[1:] if stored is not self.absmax)
        return MemoryCost(
            row_nbytes=row_nbytes,
            fixed_nbytes=fixed_nbytes + 8 * ALIGNMENT,
            scratch_blocks=scratch_blocks(TEMPORARIES, max(CHUNK_ELEMENTS, info.columns), info),
        )

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> DequantizedChunks:
        first, last = rows.start * info.columns, rows.stop * info.columns
        codes = _read_bytes(self.codes, first // 2, -(-last // 2), worker)
        blocks = range(first // self.block, -(-last // self.block))
        absmax = self._absmax(blocks, worker)
        table = byte_table(self.levels.read_all(worker).flatten(), high_first=True)

        def chunks(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for row, last_row, position in row_chunks(start, stop, info.columns):
                begin, end = row * info.columns, last_row * info.columns
                values = unpack_4bit(codes[begin // 2 - first // 2 : -(-end // 2) - first // 2], table)
                values = values[begin % 2 : begin % 2 + end - begin]
                scales = absmax(begin // self.block, -(-end // self.block))
                yield position, nf4.scale_blocks(values, scales, begin, self.block).view(last_row - row, info.columns)

        return chunks

    def _absmax(self, blocks: range, worker: Worker) -> Rows:
        """Read the absmax of the blocks; the returned function gives those of blocks [start, stop), in float32."""
        size = self.absmax.info.bits // 8
        raw = _read_bytes(self.absmax, blocks.start * size, blocks.stop * size, worker)
        if self.double_quant is None:
            values = raw.view(_dtype(self.absmax))
            return lambda start, stop: values[start - blocks.start : stop - blocks.start].float()
        levels = self.double_quant.levels.read_all(worker).flatten()
        block_absmax = self.double_quant.absmax.read_all(worker).flatten()
        offset = self.double_quant.offset

        def absmax(start: int, stop: int) -> Tensor:
            codes = raw[start - blocks.start : stop - blocks.start]
            return nf4.dequantize_absmax(codes, levels, block_absmax[start // nf4.ABSMAX_BLOCK :], offset, start)

        return absmax


def _dtype(stored: StoredTensor) -> torch.dtype:
    dtype = torch_dtype(stored.info.dtype)
    assert dtype is not None
    return dtype


def _read_bytes(stored: StoredTensor, start: int, stop: int, worker: Worker) -> Tensor:
    """Read bytes [start, stop) of a stored tensor."""
    return worker.read(stored.file, stored.offset + start, stop - start)
