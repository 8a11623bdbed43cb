"""A tensor written back as FP8: codes and their blocks' scales, each an outlet of the same computed rows.

The two need not lie in one file: transformers, vLLM and SGLang find the scales by their name.
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

SCALE_SUFFIX = "_scale_inv"  # what follows the codes' name
LIVE = 13  # bytes of temporaries for each element of a band: as float32, padded, scaled; codes


@dataclass(frozen=True)
class FP8Encoder:
    """The codes of a matrix, or (`scales`) the scales of its blocks of `block` (rows, columns).

    `info`: the tensor as it is computed; `extent`: where these codes or scales lie. A strip is whole
    blocks of the engine's and of FP8's.
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
        return "FP8's scales" if self.scales else "FP8"

    @property
    def file(self) -> str:
        return self.extent.file

    @property
    def chunk_rows(self) -> int:
        return min(math.lcm(self.info.block_rows, self.block[0]), self.info.rows)

    @property
    def row_nbytes(self) -> int:
        return self._across * 4 if self.scales else self.info.columns

    @property
    def scratch_nbytes(self) -> int:
        return LIVE * self.block[0] * (self.info.columns + self.block[1])

    @property
    def _across(self) -> int:
        return -(-self.info.columns // self.block[1])

    def chunk_nbytes(self, start: int, stop: int) -> int:
        if self.scales:
            return -(-(stop - start) // self.block[0]) * self._across * 4
        return (stop - start) * self.info.columns

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        before = start // self.block[0] * self._across * 4 if self.scales else start * self.info.columns
        return [(self.extent.offset + before, self.chunk_nbytes(start, stop))]

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        import torch

        at = 0
        for first in range(0, len(rows), self.block[0]):
            values = rows[first : first + self.block[0]].float()
            found = fp8.block_scales(values, *self.block) if self.scales else fp8.quantize(values, *self.block)[0]
            raw = found.contiguous().view(torch.uint8).flatten()
            into[at : at + len(raw)].copy_(raw, non_blocking=True)
            at += len(raw)

    def overflows(self, magnitude: float) -> bool:
        return not magnitude < math.inf


def stored_tensors(info: TensorInfo, block: tuple[int, int]) -> tuple[TensorInfo, TensorInfo]:
    """What a matrix in FP8 is stored as: its codes, and their scales."""
    shape = tuple(-(-size // wide) for size, wide in zip(info.shape, block, strict=True))
    return info.with_dtype("F8_E4M3"), TensorInfo(f"{info.name}{SCALE_SUFFIX}", "F32", shape)
