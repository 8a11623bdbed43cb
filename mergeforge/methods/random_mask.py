"""Random masks that are a function of (seed, tensor, input, element): the same on every device.

Each element gets sixteen random bits. The quarters of flat indices are hashed (lowbias32, a 32-bit integer mixer by
C. Wellons) under a key made of the rest, and each hash is split into the upper bytes of four neighbors; the lower
bytes come from another key, and are needed only where the upper byte does not decide. So any split of the tensor, any
thread and any device draws the same mask, without a generator's state; and it takes a sixth (where lower bytes are
needed) to an eleventh of the time of torch.rand on a CPU. On CPUs numpy hashes, which shifts unsigned numbers, in
chunks that stay in the cache.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from mergeforge.methods.block import Block

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Words = NDArray[np.uint32]
    Bytes = NDArray[np.uint8]
    SampleBits = NDArray[np.uint16]

HASH_CHUNK = 1 << 17
SAMPLE_VALUES = 1 << 16  # distinct values of an element's random bits
INDEX_FACTOR = 0x9E3779B9
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B  # of lowbias32
Key = tuple[int, int]


class MaskKey(NamedTuple):
    """What defines a mask: the keys of upper and lower bytes; elements whose bits are below the limit are kept."""

    upper: Key
    lower: Key
    limit: int


KEEP_ALL = MaskKey((0, 0), (0, 0), SAMPLE_VALUES)


def mask_key(block: Block, index: int, density: float) -> MaskKey:
    """The key of input `index` in a block's tensor, valid for 2**31 elements from a multiple of 2**31."""
    return MaskKey(*_keys(block, index), _limit(density)) if density < 1 else KEEP_ALL


def random_mask(like: Tensor, block: Block, index: int, density: float | Tensor) -> Tensor:
    """True with probability `density` (a number or one for each element, in steps of 2**-16), shaped as `like`."""
    import torch

    upper, lower = _keys(block, index)
    start, count = block.start & 0x7FFFFFFF, like.numel()
    limit = _limit(density) if isinstance(density, float) else density.view(-1) * SAMPLE_VALUES
    if like.device.type != "cpu":
        return _sample_bits_on_device(start, like, upper, lower).lt(limit).view(like.shape)
    if isinstance(limit, int):
        below = _samples_below(limit, start, count, upper, lower)
    else:
        below = _sample_bits(start, count, upper, lower) < limit.numpy()
    return torch.from_numpy(below).view(like.shape)


def _limit(density: float) -> int:
    return min(math.ceil(density * SAMPLE_VALUES), SAMPLE_VALUES - 1)


def _keys(block: Block, index: int) -> tuple[Key, Key]:
    text = f"{block.seed}/{block.tensor}/{index}/{block.start >> 31}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    first, second, third, fourth = (int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4))
    return (first, second), (third, fourth)


def _samples_below(limit: int, start: int, count: int, upper: Key, lower: Key) -> NDArray[np.bool_]:
    """Whether the random bits of each of `count` elements are below the limit."""
    import numpy as np

    upper_limit, lower_limit = divmod(limit, 256)
    upper_bytes = _bytes(start, count, upper)
    below = np.less(upper_bytes, np.uint8(upper_limit))
    if lower_limit:
        undecided = np.flatnonzero(upper_bytes == np.uint8(upper_limit))
        elements = undecided + start
        bits = (elements >> 2).astype(np.uint32) * np.uint32(INDEX_FACTOR)
        _hash(bits, np.empty_like(bits), *lower)
        lower_bytes = (bits >> ((elements & 3) << 3).astype(np.uint32)) & np.uint32(255)
        below[undecided] = lower_bytes < np.uint32(lower_limit)
    return below


def _sample_bits(start: int, count: int, upper: Key, lower: Key) -> SampleBits:
    """The random bits, in [0, 2**16), of `count` elements."""
    import numpy as np

    bits = _bytes(start, count, upper).astype(np.uint16)
    bits <<= np.uint16(8)
    bits |= _bytes(start, count, lower)
    return bits


def _bytes(start: int, count: int, key: Key) -> Bytes:
    """A random byte for each of `count` elements."""
    import numpy as np

    skipped = start & 3
    words = np.empty((skipped + count + 3) // 4, np.uint32)
    shifted = np.empty(min(HASH_CHUNK, len(words)), np.uint32)
    for at in range(0, len(words), HASH_CHUNK):
        bits = words[at : at + HASH_CHUNK]
        np.add(_scaled_indices()[: len(bits)], np.uint32(((start >> 2) + at) * INDEX_FACTOR & 0xFFFFFFFF), out=bits)
        _hash(bits, shifted[: len(bits)], *key)
    return words.astype("<u4", copy=False).view(np.uint8)[skipped : skipped + count]


@cache
def _scaled_indices() -> Words:
    """The first indices times INDEX_FACTOR."""
    import numpy as np

    return np.arange(HASH_CHUNK, dtype=np.uint32) * np.uint32(INDEX_FACTOR)


def _hash(bits: Words, shifted: Words, first: int, second: int) -> None:
    """Apply lowbias32 in place, with one key before it and one inside."""
    import numpy as np

    bits ^= np.uint32(first)
    bits ^= np.right_shift(bits, np.uint32(16), out=shifted)
    bits *= np.uint32(MULTIPLIER_1)
    bits ^= np.right_shift(bits, np.uint32(15), out=shifted)
    bits ^= np.uint32(second)
    bits *= np.uint32(MULTIPLIER_2)
    bits ^= np.right_shift(bits, np.uint32(16), out=shifted)


def _sample_bits_on_device(start: int, like: Tensor, upper: Key, lower: Key) -> Tensor:
    """The random bits of all elements of `like` on its device, as floats."""
    high, low = (_bytes_on_device(start, like, key) for key in (upper, lower))
    return high.mul_(256).add_(low)


def _bytes_on_device(start: int, like: Tensor, key: Key) -> Tensor:
    import torch

    elements = torch.arange(like.numel(), dtype=torch.int32, device=like.device).add_(start & 3)
    words = _hash_on_device((elements >> 2).add_(start >> 2), *key)
    return (words >> elements.bitwise_and_(3).mul_(8)).bitwise_and_(255).to(torch.float32)


def _hash_on_device(bits: Tensor, first: int, second: int) -> Tensor:
    """The same as _hash, from indices in torch, which shifts signed numbers."""
    bits = bits.mul_(_signed(INDEX_FACTOR)).bitwise_xor_(_signed(first))
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(MULTIPLIER_1)
    bits = (
        bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(_signed(second)).mul_(_signed(MULTIPLIER_2))
    )
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
