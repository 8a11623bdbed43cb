"""Where tensors go.

An *outlet* is how one file takes one tensor: it encodes rows and knows where their bytes belong. A
tensor has one outlet for each format that is written, so safetensors and several GGUF types come
out of the same computed rows. Outlets are pure: tests need no folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

ByteRange = tuple[int, int]  # (offset in the file, bytes)


class TensorEncoder(Protocol):
    """How one file takes one tensor, strip by strip.

    A strip is `strip_rows` rows (the last may be shorter): what is encoded at once, and what a
    checksum covers. It follows from shapes alone.
    """

    @property
    def key(self) -> str:
        """Its name among the outlets of a tensor."""

    @property
    def file(self) -> str: ...

    @property
    def label(self) -> str:
        """Its type, for messages."""

    @property
    def float_dtype(self) -> str:
        """The dtype of its bytes; "" where they are quantised blocks, which hold neither infinities nor NaN."""

    @property
    def chunk_rows(self) -> int: ...

    @property
    def row_nbytes(self) -> int:
        """The most bytes that a row takes, on average over a strip."""

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the temporaries that encoding a strip takes."""

    def chunk_nbytes(self, start: int, stop: int) -> int:
        """Bytes of the encoded strip of rows [start, stop)."""

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        """Where the encoded strip's bytes go, in their order."""

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        """Encode a strip (rows x columns, float, any device) into `into` (uint8, on the CPU).

        Does not change `rows`. On a device the copy is only begun: wait for the worker before reading.
        """

    def overflows(self, magnitude: float) -> bool:
        """Whether a value of this magnitude (or NaN) would not come out finite."""


def chunk_ranges(start: int, stop: int, outlet: TensorEncoder) -> Iterator[tuple[int, int]]:
    """Row ranges of the strips in [start, stop), which begins with one."""
    for at in range(start, stop, outlet.chunk_rows):
        yield at, min(at + outlet.chunk_rows, stop)


def chunk_alignment(block_rows: int, outlets: Iterable[TensorEncoder], rows: int) -> int:
    """The number of rows after which blocks and every outlet's strips begin anew."""
    return min(rows, math.lcm(block_rows, *(outlet.chunk_rows for outlet in outlets))) or 1


def coalesce_ranges(runs: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Runs with those that follow one another in the file made one."""
    offset, nbytes = 0, 0
    for at, more in runs:
        if nbytes and at == offset + nbytes:
            nbytes += more
            continue
        if nbytes:
            yield offset, nbytes
        offset, nbytes = at, more
    if nbytes:
        yield offset, nbytes
