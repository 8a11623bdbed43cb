"""Restoring a task vector's mass after some of its elements were dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from mergeforge.methods import Block, Look

if TYPE_CHECKING:
    from torch import Tensor

F = TypeVar("F")
TINY_MASS = 1e-7


@dataclass
class Rescaled(Generic[F]):
    """What a method found, and for each input the ratio to multiply what is kept by."""

    found: F
    ratios: list[float]


def ratios(look: Look, keep: Callable[[list[Tensor], Block], list[Tensor]], count: int) -> list[float]:
    """sum|delta| / sum|kept| over the whole tensor for each input, in float64; 1 where either is next to nothing.

    `keep` is given magnitudes, and decides by nothing else.
    This is mergekit's L1 rescaling. (DARE's paper divides by the density: equal on average.)
    """

    def mass(of: Tensor) -> float:
        import torch

        return float(of.sum(dtype=torch.float64))

    def masses(deltas: list[Tensor], block: Block) -> list[tuple[float, float]]:
        before = [mass(delta.abs_()) for delta in deltas]
        return list(zip(before, map(mass, keep(deltas, block)), strict=True))

    return ratios_of(look(masses), count)


def ratios_of(masses: Iterable[Sequence[tuple[float, float]]], count: int) -> list[float]:
    """The same, from the masses of the inputs (before, after) in each block."""
    seen = list(masses)
    return [_ratio(*(math.fsum(part) for part in zip(*(one[at] for one in seen), strict=True))) for at in range(count)]


def _ratio(before: float = 0.0, after: float = 0.0) -> float:
    return before / after if before >= TINY_MASS and after >= TINY_MASS else 1.0
