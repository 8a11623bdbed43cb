"""Random masks that are a function of (seed, tensor, input, element): the same on every device.

The halves of elements' flat indices are hashed (lowbias32, a 32-bit integer mixer by C. Wellons) under a
key made of the rest, and each hash is cut into the draws of two neighbours. So any cut of the tensor, any
thread and any device draws the same mask, without a generator's state; and it takes an eighth of the time
of torch.rand on a CPU. There numpy hashes, which shifts unsigned numbers, in pieces that stay in the cache.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache, partial
from typing import TYPE_CHECKING

from mergeforge.methods import Block
from mergeforge.methods.masks import Masks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Words = NDArray[np.uint32]
    Draws = NDArray[np.uint16]

PIECE = 1 << 16
DRAWS = 1 << 16  # different ones
SPREAD, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B  # of the index, and lowbias32's multipliers


def masked(deltas: list[Tensor], block: Block, density: list[float], masks: list[Masks]) -> list[Tensor]:
    """Each delta's block, in place, with elements kept at random, each with probability `density`."""
    for at, (delta, one, mask) in enumerate(zip(deltas, density, masks, strict=True)):
        if one < 1:
            mask.apply([delta], block, partial(random_mask, delta, block, at, one))
    return deltas


def random_mask(like: Tensor, block: Block, index: int, density: float | Tensor) -> Tensor:
    """True with probability `density` (a number or one for each element, in steps of 2**-16), shaped as `like`."""
    import numpy as np
    import torch

    key = hashlib.blake2b(f"{block.seed}/{block.tensor}/{index}/{block.start >> 31}".encode(), digest_size=8)
    first, second = (int.from_bytes(key.digest()[at : at + 4], "little") for at in (0, 4))
    start = block.start & 0x7FFFFFFF
    limit = min(math.ceil(density * DRAWS), DRAWS - 1) if isinstance(density, float) else density.view(-1) * DRAWS
    if like.device.type != "cpu":
        return _drawn_there(start, like, first, second).lt(limit).view(like.shape)
    below = np.uint16(limit) if isinstance(limit, int) else limit.numpy()
    return torch.from_numpy(np.less(_drawn(start, like.numel(), first, second), below)).view(like.shape)


def _drawn(start: int, count: int, first: int, second: int) -> Draws:
    """The draws, in [0, 2**16), of `count` elements."""
    import numpy as np

    skipped = start & 1
    words, shifted = np.empty((skipped + count + 1) // 2, np.uint32), np.empty(PIECE, np.uint32)
    for at in range(0, len(words), PIECE):
        bits = words[at : at + PIECE]
        np.add(_spread()[: len(bits)], np.uint32(((start >> 1) + at) * SPREAD & 0xFFFFFFFF), out=bits)
        _mix(bits, shifted[: len(bits)], first, second)
    return words.astype("<u4", copy=False).view("<u2")[skipped : skipped + count]


@cache
def _spread() -> Words:
    """The first indices times SPREAD."""
    import numpy as np

    return np.arange(PIECE, dtype=np.uint32) * np.uint32(SPREAD)


def _mix(bits: Words, shifted: Words, first: int, second: int) -> None:
    """lowbias32 in place, with a key before it and one inside."""
    import numpy as np

    bits ^= np.uint32(first)
    bits ^= np.right_shift(bits, np.uint32(16), out=shifted)
    bits *= np.uint32(FIRST)
    bits ^= np.right_shift(bits, np.uint32(15), out=shifted)
    bits ^= np.uint32(second)
    bits *= np.uint32(SECOND)
    bits ^= np.right_shift(bits, np.uint32(16), out=shifted)


def _drawn_there(start: int, like: Tensor, first: int, second: int) -> Tensor:
    """The draws of all elements of `like` on its device, as floats."""
    import torch

    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device).add_(start & 1)
    words = _mixed_there((places >> 1).add_(start >> 1), first, second)
    return (words >> places.bitwise_and_(1).mul_(16)).bitwise_and_(DRAWS - 1).to(torch.float32)


def _mixed_there(bits: Tensor, first: int, second: int) -> Tensor:
    """The same as _mix, from indices in torch, which shifts signed numbers."""
    bits = bits.mul_(_signed(SPREAD)).bitwise_xor_(_signed(first))
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(FIRST)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(_signed(second)).mul_(_signed(SECOND))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
