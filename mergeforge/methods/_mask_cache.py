"""Masks that the statistics pass draws once and the merge reuses, as bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.methods import Block

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CACHED_ELEMENTS = 1 << 24  # elements of an input whose masks are cached: 2 MB
MASK_CACHE_NBYTES = CACHED_ELEMENTS // 8


@dataclass
class MaskCache:
    """The masks of a tensor's blocks, by the blocks' starts, for up to `capacity` elements.

    Masks beyond that, and all masks on devices other than the CPU, are drawn again each time. The bits lie
    in one array: small arrays between the blocks of a merge would fragment its memory.
    """

    capacity: int = 0
    used: int = 0
    bits: NDArray[np.uint8] | None = None
    byte_ranges: dict[int, tuple[int, int]] = field(default_factory=dict)

    def apply(self, deltas: list[Tensor], block: Block, draw: Callable[[], Tensor]) -> None:
        """Multiply each delta by the block's mask, in place; `draw` returns it as booleans, or ones and zeros.

        numpy multiplies by booleans three times as fast as torch.
        """
        import numpy as np

        if deltas[0].device.type != "cpu":
            mask = draw()
            for delta in deltas:
                delta.mul_(mask)
            return
        bools = self._mask(block, deltas[0].numel(), draw).reshape(deltas[0].shape)
        for delta in deltas:
            np.multiply(delta.numpy(), bools, out=delta.numpy())

    def _mask(self, block: Block, numel: int, draw: Callable[[], Tensor]) -> NDArray[np.bool_]:
        import numpy as np

        if block.start in self.byte_ranges and self.bits is not None:
            first, end = self.byte_ranges[block.start]
            return np.unpackbits(self.bits[first:end], count=numel).view(np.bool_)
        mask: NDArray[np.bool_] = draw().numpy().astype(np.bool_, copy=False)
        self._store(mask, block)
        return mask

    def _store(self, mask: NDArray[np.bool_], block: Block) -> None:
        import numpy as np

        if self.bits is None:
            self.bits = np.empty(self.capacity // 8, np.uint8)
        end = self.used + -(-mask.size // 8)
        if end <= len(self.bits):
            self.bits[self.used : end] = np.packbits(mask)
            self.byte_ranges[block.start] = self.used, end
            self.used = end
