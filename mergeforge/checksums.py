"""Checksums of output tensors: of each block, and of a tensor from those of its blocks.

XXH3-128 over each block's bytes; a tensor's is XXH3-128 over its blocks' digests in order, so tiles
can be written in any order and a part can be checked alone. It guards against damage, not against
forgery (40 GB/s here; SHA-256 takes 1.5 GB/s and would slow every merge).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import xxhash

from mergeforge.tensors import TensorInfo, Tile, blocks

if TYPE_CHECKING:
    from torch import Tensor


def block_checksums(data: Tensor, tile: Tile, info: TensorInfo) -> tuple[str, ...]:
    """Hex digests of a tile's blocks; `data` holds the tile's bytes (uint8, on the CPU)."""
    view, width = data.numpy().data, info.row_nbytes
    ranges = ((start - tile.start, stop - tile.start) for start, stop in blocks(tile, info))
    return tuple(xxhash.xxh3_128_hexdigest(view[start * width : stop * width]) for start, stop in ranges)


def tensor_checksum(checksums: Iterable[str]) -> str:
    """Hex digest of a whole tensor from those of its blocks, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(bytes.fromhex(one) for one in checksums))
