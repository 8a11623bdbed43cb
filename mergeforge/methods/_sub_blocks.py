"""A block in parts: views of the same places of every input, so that what is made of them stays small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 4096  # bounds what a method holds for each row, however short the rows are
ELEMENTS = 1 << 16  # of all inputs together: an eighth of a block


def by_rows(inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """Some thousand whole rows at once, or as many as make an eighth of a block over all inputs."""
    step = max(1, min(ROWS, ELEMENTS // max(1, len(inputs) * inputs[0].shape[1])))
    for start in range(0, len(inputs[0]), step):
        yield [one[start : start + step] for one in inputs]


def by_elements(inputs: list[Tensor], made: int | None = None) -> Iterator[list[Tensor]]:
    """As many elements at once, flat, as make an eighth of a block over all inputs, or over the `made` temporaries."""
    flat = [one.view(-1) for one in inputs]
    step = max(1, ELEMENTS // (made or len(inputs)))
    for start in range(0, len(flat[0]), step):
        yield [one[start : start + step] for one in flat]
