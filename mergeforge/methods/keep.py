"""What a method keeps of each input: all of it, or elements chosen at random, by magnitude, by rank or by variance.

Each kind is defined twice: `drop` in torch, and masks.h in the C library, which takes its numbers from `native_table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mergeforge.methods.block import Block
from mergeforge.methods.kth_largest import Threshold
from mergeforge.methods.random_mask import MaskKey, mask_key, random_mask
from mergeforge.methods.rank_mask import rank_mask
from mergeforge.methods.sub_blocks import by_elements
from mergeforge.methods.thresholds import trim
from mergeforge.methods.variance import variance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Integers = NDArray[np.int64]
    Words = NDArray[np.uint32]

UNBOUNDED = 0x7FFFFFFF  # bits that no magnitude exceeds


class Keep(Protocol):
    """Decides which elements of the inputs are kept.

    `native_kind`: its number in reductions.h. `native_table`: the array that the C library decides by; it may count
    off ties there.
    """

    native_kind: ClassVar[int]

    @property
    def native_table(self) -> Any: ...

    def drop(self, inputs: Sequence[Tensor], block: Block) -> None:
        """Zero what is not kept of the inputs' block, in place. Blocks come in the tensor's order, from the first."""


@dataclass(frozen=True)
class KeepWhole:
    """All of every input."""

    native_kind: ClassVar[int] = 0
    native_table: ClassVar[None] = None

    def drop(self, inputs: Sequence[Tensor], block: Block) -> None:
        pass


@dataclass(frozen=True)
class KeepRandom:
    """Each element with the probability `density` of its input (random_mask.py)."""

    native_kind: ClassVar[int] = 1
    density: Sequence[float]
    first_block: Block

    def drop(self, inputs: Sequence[Tensor], block: Block) -> None:
        for index, (values, density) in enumerate(zip(inputs, self.density, strict=True)):
            if density < 1:
                _apply_mask(values, random_mask(values, block, index, density))

    @cached_property
    def native_table(self) -> Words:
        import numpy as np

        keys = [mask_key(self.first_block, index, density) for index, density in enumerate(self.density)]
        return np.array([_mask_words(key) for key in keys], np.uint32)


@dataclass(frozen=True)
class KeepRanks:
    """Each element with a probability that grows with its rank in its row (rank_mask.py)."""

    native_kind: ClassVar[int] = 3
    density: Sequence[float]
    epsilon: Sequence[float]
    first_block: Block

    def drop(self, inputs: Sequence[Tensor], block: Block) -> None:
        for index, (values, mean, spread) in enumerate(zip(inputs, self.density, self.epsilon, strict=True)):
            if mean < 1:
                _apply_mask(values, rank_mask(values, block, index, mean, spread))

    @cached_property
    def native_table(self) -> Words:
        import numpy as np

        table = np.zeros((len(self.density), 9), np.uint32)
        for index, density in enumerate(self.density):
            table[index, :5] = _mask_words(mask_key(self.first_block, index, density))
        table[:, 5:] = np.array([self.density, self.epsilon], np.float64).T.copy().view(np.uint32)
        return table


@dataclass(frozen=True)
class MagnitudeRange:
    """The elements that reach the `lower` threshold, except those that reach the `upper` one, if there is one."""

    lower: Threshold
    upper: Threshold | None = None

    def drop(self, values: Tensor, is_first: bool) -> None:
        """Zero what is outside the range, in place."""
        if self.upper is None:
            trim(self.lower, values, is_first)
            return
        for (part,) in by_elements([values]):
            above = trim(self.upper, part.clone(), is_first)
            trim(self.lower, part, is_first).sub_(above)
            is_first = False


@dataclass(frozen=True)
class KeepMagnitudes:
    """The elements of each input in its range of magnitudes; None keeps all of it."""

    native_kind: ClassVar[int] = 2
    ranges: Sequence[MagnitudeRange | None]

    def drop(self, inputs: Sequence[Tensor], block: Block) -> None:
        for values, magnitudes in zip(inputs, self.ranges, strict=True):
            if magnitudes:
                magnitudes.drop(values, block.start == 0)

    @cached_property
    def native_table(self) -> Integers:
        import numpy as np

        return np.array([_range_row(magnitudes) for magnitudes in self.ranges], np.int64)


@dataclass(frozen=True)
class KeepVarying:
    """The elements whose variance over the inputs reaches a threshold, of every input."""

    native_kind: ClassVar[int] = 4
    threshold: Threshold

    def drop(self, inputs: Sequence[Tensor], block: Block) -> None:
        is_first = block.start == 0
        for parts in by_elements(list(inputs)):
            kept = trim(self.threshold, variance(parts), is_first).ne_(0)
            for values in parts:
                values.mul_(kept)
            is_first = False

    @cached_property
    def native_table(self) -> Integers:
        import numpy as np

        return np.array([_range_row(MagnitudeRange(self.threshold))], np.int64)


def _range_row(magnitudes: MagnitudeRange | None) -> list[int]:
    """struct magnitude_range of masks.h; negative bits keep all."""
    if magnitudes is None:
        return [-1, 0, 0, UNBOUNDED, 0, 0]
    lower, upper = magnitudes.lower, magnitudes.upper
    return [lower.bits, lower.ties_kept, 0, *([upper.bits, upper.ties_kept, 0] if upper else [UNBOUNDED, 0, 0])]


def _mask_words(key: MaskKey) -> list[int]:
    """struct random_mask of masks.h."""
    return [*key.upper, *key.lower, key.limit]


def _apply_mask(values: Tensor, mask: Tensor) -> None:
    """Multiply by a mask of booleans, in place. On a CPU numpy does it three times as fast as torch."""
    import numpy as np

    if values.device.type == "cpu":
        array = values.numpy()
        with np.errstate(invalid="ignore"):  # a dropped infinity becomes NaN, which the run refuses
            np.multiply(array, mask.numpy().reshape(array.shape), out=array)
    else:
        values.mul_(mask)


MIN_L1_NORM = 1e-7


def l1_ratios(norms: Sequence[tuple[float, float]]) -> list[float]:
    """The factors that restore the L1 norms of what is kept; 1 where either norm is below 1e-7.

    This is mergekit's L1 rescaling. (DARE's paper divides by the density: equal on average.)
    """
    return [_ratio(before, after) for before, after in norms]


def _ratio(before: float, after: float) -> float:
    return before / after if before >= MIN_L1_NORM and after >= MIN_L1_NORM else 1.0
