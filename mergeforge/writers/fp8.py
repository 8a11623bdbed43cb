"""A tensor written as FP8: codes and the scales of their blocks, each by an encoder of the same computed rows.

The two may be in different files: transformers, vLLM and SGLang find the scales by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.file_layout import Extent
from mergeforge.quant_codecs import fp8
from mergeforge.writers.encoder import ByteRange

if TYPE_CHECKING:
    from torch import Tensor

SCALE_SUFFIX = "_scale_inv"  # appended to the name of the codes
SCRATCH_PER_ELEMENT = 13  # bytes of temporaries per element of a row of blocks: float32, padded, scaled; codes


@dataclass(frozen=True)
class FP8Encoder:
    """Writes the codes of a matrix or, with `scales`, the scales of its blocks of `block` (rows, columns).

    `info`: the computed tensor; `extent`: the place of these codes or scales. A chunk is a whole number of computed
    blocks and of FP8 blocks.
    """

    info: TensorInfo
    extent: Extent
    block: tuple[int, int]
    scales: bool = False

    float_dtype: str = ""

    @property
    def key(self) -> str:
        return f"fp8{SCALE_SUFFIX}" if self.scales else "fp8"

    @property
    def label(self) -> str:
        return "FP8 scales" if self.scales else "FP8"

    @property
    def file(self) -> str:
        return self.extent.file

    @property
    def chunk_rows(self) -> int:
        return min(math.lcm(self.info.block_rows, self.block[0]), self.info.rows)

    @property
    def row_nbytes(self) -> int:
        return self._blocks_across * 4 if self.scales else self.info.columns

    @property
    def scratch_nbytes(self) -> int:
        return SCRATCH_PER_ELEMENT * self.block[0] * (self.info.columns + self.block[1])

    @property
    def _blocks_across(self) -> int:
        return -(-self.info.columns // self.block[1])

    def chunk_nbytes(self, start: int, stop: int) -> int:
        if self.scales:
            return -(-(stop - start) // self.block[0]) * self._blocks_across * 4
        return (stop - start) * self.info.columns

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        skipped = start // self.block[0] * self._blocks_across * 4 if self.scales else start * self.info.columns
        return [(self.extent.offset + skipped, self.chunk_nbytes(start, stop))]

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        import torch

        position = 0
        for first in range(0, len(rows), self.block[0]):
            values = rows[first : first + self.block[0]].float()
            encoded = fp8.block_scales(values, *self.block) if self.scales else fp8.quantize(values, *self.block)[0]
            raw = encoded.contiguous().view(torch.uint8).flatten()
            into[position : position + len(raw)].copy_(raw, non_blocking=True)
            position += len(raw)

    def overflows(self, magnitude: float) -> bool:
        return not magnitude < math.inf


def stored_tensors(info: TensorInfo, block: tuple[int, int]) -> tuple[TensorInfo, TensorInfo]:
    """The two tensors that store a matrix as FP8: its codes and their scales."""
    shape = tuple(-(-size // block_size) for size, block_size in zip(info.shape, block, strict=True))
    return info.with_dtype("F8_E4M3"), TensorInfo(f"{info.name}{SCALE_SUFFIX}", "F32", shape)
