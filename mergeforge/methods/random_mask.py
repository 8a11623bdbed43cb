"""Random masks that are a function of (seed, tensor, input, element): the same on every device.

Each element's flat index is hashed (lowbias32, a 32-bit integer mixer by C. Wellons) under a key
made of the rest. So any cut of the tensor, any thread and any device draws the same mask, without a
generator's state; and it takes a quarter of the time of torch.rand on a CPU. There numpy hashes, which
shifts unsigned numbers, in pieces that stay in the cache.
"""

from __future__ import annotations

import hashlib
from functools import cache, partial
from typing import TYPE_CHECKING

from mergeforge.methods import Block
from mergeforge.methods.masks import Masks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Words = NDArray[np.uint32]

PIECE = 1 << 16
SPREAD, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B  # of the index, and lowbias32's multipliers


def masked(deltas: list[Tensor], block: Block, density: list[float], masks: list[Masks]) -> list[Tensor]:
    """Each delta's block, in place, with elements kept at random, each with probability `density`."""
    for at, (delta, one, mask) in enumerate(zip(deltas, density, masks, strict=True)):
        if one < 1:
            mask.apply([delta], block, partial(random_mask, delta, block, at, one))
    return deltas


def random_mask(like: Tensor, block: Block, index: int, density: float | Tensor) -> Tensor:
    """True with probability `density` (a number or one for each element, in steps of 2**-24), shaped as `like`."""
    import torch

    key = hashlib.blake2b(f"{block.seed}/{block.tensor}/{index}/{block.start >> 31}".encode(), digest_size=8)
    first, second = (int.from_bytes(key.digest()[at : at + 4], "little") for at in (0, 4))
    start, limit = block.start & 0x7FFFFFFF, density * 2**24
    if like.device.type != "cpu":
        bits = torch.arange(like.numel(), dtype=torch.int32, device=like.device).add_(start)
        return _mixed_there(bits, first, second).to(torch.float32).view(like.shape).lt(limit)
    mask = torch.empty(like.shape, dtype=torch.bool)
    _draw(mask.numpy().reshape(-1), start, first, second, limit if isinstance(limit, float) else limit.view(-1).numpy())
    return mask


def _draw(mask: NDArray[np.bool_], start: int, first: int, second: int, limit: float | NDArray[np.float32]) -> None:
    """Whether each element's hash, in [0, 2**24), is less than the limit; compared in float32."""
    import numpy as np

    words, shifted = np.empty(PIECE, np.uint32), np.empty(PIECE, np.uint32)
    for at in range(0, len(mask), PIECE):
        size = min(PIECE, len(mask) - at)
        bits = np.add(_spread()[:size], np.uint32((start + at) * SPREAD & 0xFFFFFFFF), out=words[:size])
        _mix(bits, shifted[:size], first, second)
        if isinstance(limit, float):
            np.less(bits, np.uint32(np.ceil(np.float32(limit))), out=mask[at : at + size])
        else:
            np.less(bits.astype(np.float32), limit[at : at + size], out=mask[at : at + size])


@cache
def _spread() -> Words:
    """The first indices times SPREAD."""
    import numpy as np

    return np.arange(PIECE, dtype=np.uint32) * np.uint32(SPREAD)


def _mix(bits: Words, shifted: Words, first: int, second: int) -> None:
    """lowbias32 in place, with a key before it and one inside, and its lowest 24 bits."""
    import numpy as np

    bits ^= np.uint32(first)
    bits ^= np.right_shift(bits, np.uint32(16), out=shifted)
    bits *= np.uint32(FIRST)
    bits ^= np.right_shift(bits, np.uint32(15), out=shifted)
    bits ^= np.uint32(second)
    bits *= np.uint32(SECOND)
    bits ^= np.right_shift(bits, np.uint32(16), out=shifted)
    bits &= np.uint32(0xFFFFFF)


def _mixed_there(bits: Tensor, first: int, second: int) -> Tensor:
    """The same from indices in torch, which shifts signed numbers."""
    bits = bits.mul_(_signed(SPREAD)).bitwise_xor_(_signed(first))
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(FIRST)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(_signed(second)).mul_(_signed(SECOND))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).bitwise_and_(0xFFFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
