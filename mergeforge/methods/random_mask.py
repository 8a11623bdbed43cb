"""Random masks that are a function of (seed, tensor, input, element): the same on every device.

Each element's flat index is hashed (lowbias32, a 32-bit integer mixer by C. Wellons) under a key
made of the rest. So any cut of the tensor, any thread and any device draws the same mask, without a
generator's state; and it takes a third of the time of torch.rand on a CPU.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mergeforge.methods import Block

if TYPE_CHECKING:
    from torch import Tensor


def masked(deltas: list[Tensor], block: Block, density: list[float]) -> list[Tensor]:
    """Each delta's block, in place, with elements kept at random, each with probability `density`."""
    return [
        delta if one >= 1 else delta.mul_(random_mask(delta, block, at, one))
        for at, (delta, one) in enumerate(zip(deltas, density, strict=True))
    ]


def random_mask(like: Tensor, block: Block, index: int, density: float | Tensor) -> Tensor:
    """Ones with probability `density` (a number or one for each element, in steps of 2**-24), else zeros.

    Float, shaped as `like`.
    """
    import torch

    key = hashlib.blake2b(f"{block.seed}/{block.tensor}/{index}/{block.start >> 31}".encode(), digest_size=8)
    first, second = (_signed(int.from_bytes(key.digest()[at : at + 4], "little")) for at in (0, 4))
    start = block.start & 0x7FFFFFFF
    bits = torch.arange(like.numel(), dtype=torch.int32, device=like.device).add_(start)
    bits = _mixed(bits.mul_(_signed(0x9E3779B9)).bitwise_xor_(first), second)
    uniform = bits.bitwise_and_(0xFFFFFF).to(torch.float32).view(like.shape)
    return uniform.lt_(density * 2**24).to(like.dtype)


def _mixed(bits: Tensor, key: int) -> Tensor:
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(key).mul_(_signed(0x846CA68B))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
