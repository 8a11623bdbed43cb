"""What methods keep of task vectors by magnitude: the largest elements, or those between two thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mergeforge.methods import Block, Look
from mergeforge.methods._rescale import Rescaled, ratios, ratios_of
from mergeforge.methods._sub_blocks import by_elements
from mergeforge.methods._thresholds import Threshold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Integers = NDArray[np.int64]

NO_MAGNITUDE = 0x7FFFFFFF  # bits that no magnitude exceeds


@dataclass
class Band:
    """What reaches the threshold `outer`, but not what reaches `inner`, if there is one."""

    outer: Threshold
    inner: Threshold | None = None

    def keep(self, delta: Tensor, block: Block) -> Tensor:
        """Zero what is outside the band, in place. Blocks must come in the tensor's order, from the first one on."""
        begins = block.start == 0
        if self.inner is None:
            return self.outer.trim(delta, begins)
        for (part,) in by_elements([delta]):
            above = self.inner.trim(part.clone(), begins)
            self.outer.trim(part, begins).sub_(above)
            begins = False
        return delta


@dataclass
class Bands:
    """The band of each task vector; None keeps all of it."""

    bands: list[Band | None]

    def keep(self, deltas: list[Tensor], block: Block) -> list[Tensor]:
        """Each delta's block, in place, as Band does it."""
        return [band.keep(delta, block) if band else delta for delta, band in zip(deltas, self.bands, strict=True)]

    @cached_property
    def table(self) -> Integers:
        """struct band of kernels.c for each task vector: kernels count off ties in it."""
        import numpy as np

        return np.array([_row(band) for band in self.bands], np.int64)

    def rescaled(self, look: Look, rescale: bool) -> Rescaled[Bands]:
        """With what restores each task vector's mass."""
        count = len(self.bands)
        if not rescale:
            return Rescaled(self, [1.0] * count)
        if masses := getattr(look, "masses", None):
            return Rescaled(self, ratios_of(masses(bands=self.table), count))
        return Rescaled(self, ratios(look, self.keep, count))


def _row(band: Band | None) -> list[int]:
    if band is None:
        return [-1, 0, 0, NO_MAGNITUDE, 0, 0]
    high = [band.inner.bits, band.inner.ties_kept, 0] if band.inner else [NO_MAGNITUDE, 0, 0]
    return [band.outer.bits, band.outer.ties_kept, 0, *high]
