"""Encoders: how the rows of one tensor become bytes of one output file, and where those bytes go.

A tensor has one encoder per format that is written, so safetensors and several GGUF types come from the same computed
rows. Encoders do no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

ByteRange = tuple[int, int]  # (offset in the file, bytes)


class TensorEncoder(Protocol):
    """Encodes one tensor for one file, chunk by chunk.

    A chunk is `chunk_rows` rows (the last one may be shorter): the unit of encoding and of checksums. It depends only
    on shapes.
    """

    @property
    def key(self) -> str:
        """Its name among the encoders of a tensor."""

    @property
    def file(self) -> str: ...

    @property
    def label(self) -> str:
        """The type that it writes, for messages."""

    @property
    def float_dtype(self) -> str:
        """The dtype of its bytes; "" for quantized blocks, which can hold neither infinities nor NaN."""

    @property
    def chunk_rows(self) -> int: ...

    @property
    def row_nbytes(self) -> int:
        """The largest number of bytes per row, as the average over a chunk."""

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of temporaries that encoding a chunk needs."""

    def chunk_nbytes(self, start: int, stop: int) -> int:
        """Bytes of the encoded chunk of rows [start, stop)."""

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        """Where the bytes of the encoded chunk go, in their order."""

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        """Encode a chunk (rows x columns, float, any device) into `into` (uint8, on the CPU).

        Does not change `rows`. From a GPU the copy is asynchronous: synchronize the worker before reading.
        """

    def overflows(self, magnitude: float) -> bool:
        """Whether a value of this magnitude (or NaN) would not be finite after encoding."""


def chunk_ranges(start: int, stop: int, encoder: TensorEncoder) -> Iterator[tuple[int, int]]:
    """Row ranges of the chunks in [start, stop); `start` is the start of a chunk."""
    for first in range(start, stop, encoder.chunk_rows):
        yield first, min(first + encoder.chunk_rows, stop)


def chunk_alignment(block_rows: int, encoders: Iterable[TensorEncoder], rows: int) -> int:
    """The number of rows after which a block and a chunk of every encoder start together."""
    return min(rows, math.lcm(block_rows, *(encoder.chunk_rows for encoder in encoders))) or 1


def coalesce_ranges(ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Byte ranges, with consecutive ones that are adjacent in the file merged."""
    offset, nbytes = 0, 0
    for next_offset, next_nbytes in ranges:
        if nbytes and next_offset == offset + nbytes:
            nbytes += next_nbytes
            continue
        if nbytes:
            yield offset, nbytes
        offset, nbytes = next_offset, next_nbytes
    if nbytes:
        yield offset, nbytes
