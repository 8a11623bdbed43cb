"""Random masks that are a function of (seed, tensor, input, element): the same on every device.

An element's draw has sixteen bits. The quarters of flat indices are hashed (lowbias32, a 32-bit integer mixer by
C. Wellons) under a key made of the rest, and each hash is cut into the upper bytes of four neighbours; the lower
bytes come from another key, and are needed only where the upper one does not decide. So any cut of the tensor, any
thread and any device draws the same mask, without a generator's state; and it takes a sixth (where lower bytes are
needed) to an eleventh of the time of torch.rand on a CPU. There numpy hashes, which shifts unsigned numbers, in
pieces that stay in the cache.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

from mergeforge.methods import Block
from mergeforge.methods._mask_cache import Masks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Words = NDArray[np.uint32]
    Bytes = NDArray[np.uint8]
    Draws = NDArray[np.uint16]

PIECE = 1 << 17
DRAWS = 1 << 16  # different ones
SPREAD, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B  # of the index, and lowbias32's multipliers
Key = tuple[int, int]


class Drawing(NamedTuple):
    """What a mask is drawn by: the keys of upper and lower bytes; draws below the limit are kept."""

    upper: Key
    lower: Key
    limit: int


EVERYTHING = Drawing((0, 0), (0, 0), DRAWS)


def masked(deltas: list[Tensor], block: Block, density: list[float], masks: list[Masks]) -> list[Tensor]:
    """Each delta's block, in place, with elements kept at random, each with probability `density`."""
    for at, (delta, one, mask) in enumerate(zip(deltas, density, masks, strict=True)):
        if one < 1:
            mask.apply([delta], block, partial(random_mask, delta, block, at, one))
    return deltas


def drawing(block: Block, index: int, density: float) -> Drawing:
    """How input `index` of a block's tensor is drawn, as far as 2**31 elements from a multiple of that many."""
    return Drawing(*_keys(block, index), _limit(density)) if density < 1 else EVERYTHING


def random_mask(like: Tensor, block: Block, index: int, density: float | Tensor) -> Tensor:
    """True with probability `density` (a number or one for each element, in steps of 2**-16), shaped as `like`."""
    import torch

    upper, lower = _keys(block, index)
    start, count = block.start & 0x7FFFFFFF, like.numel()
    limit = _limit(density) if isinstance(density, float) else density.view(-1) * DRAWS
    if like.device.type != "cpu":
        return _drawn_there(start, like, upper, lower).lt(limit).view(like.shape)
    if isinstance(limit, int):
        below = _drawn_below(limit, start, count, upper, lower)
    else:
        below = _drawn(start, count, upper, lower) < limit.numpy()
    return torch.from_numpy(below).view(like.shape)


def _limit(density: float) -> int:
    return min(math.ceil(density * DRAWS), DRAWS - 1)


def _keys(block: Block, index: int) -> tuple[Key, Key]:
    text = f"{block.seed}/{block.tensor}/{index}/{block.start >> 31}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    first, second, third, fourth = (int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4))
    return (first, second), (third, fourth)


def _drawn_below(limit: int, start: int, count: int, upper: Key, lower: Key) -> NDArray[np.bool_]:
    """Whether the draws of `count` elements are below the limit."""
    import numpy as np

    highest, rest = divmod(limit, 256)
    drawn = _bytes(start, count, upper)
    below = np.less(drawn, np.uint8(highest))
    if rest:
        open_ = np.flatnonzero(drawn == np.uint8(highest))
        places = open_ + start
        bits = (places >> 2).astype(np.uint32) * np.uint32(SPREAD)
        _mix(bits, np.empty_like(bits), *lower)
        below[open_] = (bits >> ((places & 3) << 3).astype(np.uint32)) & np.uint32(255) < np.uint32(rest)
    return below


def _drawn(start: int, count: int, upper: Key, lower: Key) -> Draws:
    """The draws, in [0, 2**16), of `count` elements."""
    import numpy as np

    drawn = _bytes(start, count, upper).astype(np.uint16)
    drawn <<= np.uint16(8)
    drawn |= _bytes(start, count, lower)
    return drawn


def _bytes(start: int, count: int, key: Key) -> Bytes:
    """A random byte for each of `count` elements."""
    import numpy as np

    skipped = start & 3
    words = np.empty((skipped + count + 3) // 4, np.uint32)
    shifted = np.empty(min(PIECE, len(words)), np.uint32)
    for at in range(0, len(words), PIECE):
        bits = words[at : at + PIECE]
        np.add(_spread()[: len(bits)], np.uint32(((start >> 2) + at) * SPREAD & 0xFFFFFFFF), out=bits)
        _mix(bits, shifted[: len(bits)], *key)
    return words.astype("<u4", copy=False).view(np.uint8)[skipped : skipped + count]


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


def _drawn_there(start: int, like: Tensor, upper: Key, lower: Key) -> Tensor:
    """The draws of all elements of `like` on its device, as floats."""
    high, low = (_bytes_there(start, like, key) for key in (upper, lower))
    return high.mul_(256).add_(low)


def _bytes_there(start: int, like: Tensor, key: Key) -> Tensor:
    import torch

    places = torch.arange(like.numel(), dtype=torch.int32, device=like.device).add_(start & 3)
    words = _mixed_there((places >> 2).add_(start >> 2), *key)
    return (words >> places.bitwise_and_(3).mul_(8)).bitwise_and_(255).to(torch.float32)


def _mixed_there(bits: Tensor, first: int, second: int) -> Tensor:
    """The same as _mix, from indices in torch, which shifts signed numbers."""
    bits = bits.mul_(_signed(SPREAD)).bitwise_xor_(_signed(first))
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(FIRST)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(_signed(second)).mul_(_signed(SECOND))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
