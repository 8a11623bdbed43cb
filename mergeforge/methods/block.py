"""Block: the rows of a tensor that a method sees at a time, and what passes over a tensor block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


@dataclass(frozen=True)
class Block:
    """The position of a block: its tensor, the flat index of its first element, and the merge's seed.

    `is_vector`: the tensor is 1-D, and its elements are the rows of the block.
    """

    tensor: str
    start: int
    seed: int
    is_vector: bool = False


class BlockScan(Protocol):
    """One pass over a tensor: run `visit(inputs, block)` on every block, or on about `sample` of them, in order."""

    def __call__(self, visit: Callable[[list[Tensor], Block], R], sample: int = 0) -> Iterator[R]: ...
