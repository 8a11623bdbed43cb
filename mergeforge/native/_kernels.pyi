"""Types of the C library; module.c documents the functions."""

from collections.abc import Sequence
from typing import Any

Input = tuple[Any, int, str]  # (array of bytes or file descriptor, byte offset, dtype)
Interval = tuple[int, int, int, int, Any]  # (input, low, high, guess, inside)

INTERFACE: int
QUANT_TYPES: dict[str, tuple[int, int]]  # elements and bytes of a block

class ReadError(Exception): ...

def reduce(
    inputs: list[Input],
    has_base: bool,
    reduction: tuple[Any, ...],
    element: int,
    length: int,
    dtype: str,
    out: Any,
    changes: Any,
    measured: int,
    read_buffer: Any,
    /,
) -> float: ...
def l1_norms(
    inputs: list[Input],
    has_base: bool,
    reduction: tuple[Any, ...],
    element: int,
    length: int,
    sums: Any,
    read_buffer: Any,
    /,
) -> None: ...
def kept_squares(
    inputs: list[Input],
    has_base: bool,
    reduction: tuple[Any, ...],
    element: int,
    length: int,
    sums: Any,
    read_buffer: Any,
    /,
) -> None: ...
def load_values(inputs: list[Input], has_base: bool, length: int, out: Any, read_buffer: Any, /) -> None: ...
def variances(inputs: list[Input], has_base: bool, length: int, out: Any, read_buffer: Any, /) -> None: ...
def inner_products(inputs: list[Input], has_base: bool, length: int, sums: Any, read_buffer: Any, /) -> None: ...
def count_magnitudes(
    inputs: list[Input], has_base: bool, length: int, intervals: Sequence[Interval], counts: Any, read_buffer: Any, /
) -> int: ...
def quantize(type: str, rows: Any, importance: Any, columns: int, out: Any, /) -> None: ...
def vector_width(limit: int = ..., /) -> int: ...
