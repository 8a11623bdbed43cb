"""Checksums of written bytes: one per chunk (in safetensors a block), and one per tensor from those of its chunks.

A chunk's checksum is XXH3-128 over its bytes; a tensor's is XXH3-128 over the digests of its chunks in order, so tiles
can be written in any order and a part can be checked alone. It detects damage, not forgery (40 GB/s; SHA-256 at
1.5 GB/s would slow down every merge).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def chunk_checksums(data: NDArray[np.uint8], sizes: Iterable[int]) -> tuple[str, ...]:
    """Hex digests of consecutive chunks in `data`; `sizes` in bytes."""
    view, start, digests = data.data, 0, []
    for size in sizes:
        digests.append(xxhash.xxh3_128_hexdigest(view[start : start + size]))
        start += size
    return tuple(digests)


def tensor_checksum(checksums: Iterable[str]) -> str:
    """Hex digest of a whole tensor from those of its chunks, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(bytes.fromhex(checksum) for checksum in checksums))


def git_sha1(data: bytes) -> str:
    """The SHA-1 by which git, and so the Hub, identifies the content of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()
