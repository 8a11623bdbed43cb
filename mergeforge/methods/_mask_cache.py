"""Masks that are made once, when a method looks at a tensor, and are there as bits when it merges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.methods import Block

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

KEPT = 1 << 24  # elements of an input whose masks are kept: 2 MB
MASKS_NBYTES = KEPT // 8


@dataclass
class Masks:
    """The masks of a tensor's blocks by the blocks' starts, as far as `room` elements go.

    What does not fit, and all masks on other devices than the CPU, are made again each time. The bits lie
    in one piece: small arrays between the blocks of a merge would break up its memory.
    """

    room: int = 0
    used: int = 0
    bits: NDArray[np.uint8] | None = None
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def apply(self, deltas: list[Tensor], block: Block, make: Callable[[], Tensor]) -> None:
        """Multiply each delta by the block's mask, in place; `make` gives it as booleans, or ones and zeros.

        numpy multiplies by booleans three times as fast as torch.
        """
        import numpy as np

        if deltas[0].device.type != "cpu":
            mask = make()
            for delta in deltas:
                delta.mul_(mask)
            return
        chosen = self._chosen(block, deltas[0].numel(), make).reshape(deltas[0].shape)
        for delta in deltas:
            np.multiply(delta.numpy(), chosen, out=delta.numpy())

    def _chosen(self, block: Block, numel: int, make: Callable[[], Tensor]) -> NDArray[np.bool_]:
        import numpy as np

        if block.start in self.places and self.bits is not None:
            first, end = self.places[block.start]
            return np.unpackbits(self.bits[first:end], count=numel).view(np.bool_)
        chosen: NDArray[np.bool_] = make().numpy().astype(np.bool_, copy=False)
        self._keep(chosen, block)
        return chosen

    def _keep(self, chosen: NDArray[np.bool_], block: Block) -> None:
        import numpy as np

        if self.bits is None:
            self.bits = np.empty(self.room // 8, np.uint8)
        end = self.used + -(-chosen.size // 8)
        if end <= len(self.bits):
            self.bits[self.used : end] = np.packbits(chosen)
            self.places[block.start] = self.used, end
            self.used = end
