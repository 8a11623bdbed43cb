"""Sub-blocks: views of the same elements of every input, small enough that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_ROWS = 4096  # bounds what a method holds for each row, however short the rows are
MAX_ELEMENTS = 1 << 16  # of all inputs together: an eighth of a block


def by_rows(inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield whole rows of every input: at most 4096, and at most an eighth of a block over all inputs."""
    step = max(1, min(MAX_ROWS, MAX_ELEMENTS // max(1, len(inputs) * inputs[0].shape[1])))
    for start in range(0, len(inputs[0]), step):
        yield [tensor[start : start + step] for tensor in inputs]


def by_elements(inputs: list[Tensor], temporaries: int | None = None) -> Iterator[list[Tensor]]:
    """Yield flat elements of every input: an eighth of a block over all inputs, or over so many `temporaries`."""
    flat = [tensor.view(-1) for tensor in inputs]
    step = max(1, MAX_ELEMENTS // (temporaries or len(inputs)))
    for start in range(0, len(flat[0]), step):
        yield [tensor[start : start + step] for tensor in flat]
