"""Checksums of what is written: of each strip (in safetensors a block), and of a tensor from those of its strips.

XXH3-128 over each strip's bytes; a tensor's is XXH3-128 over its strips' digests in order, so tiles
can be written in any order and a part can be checked alone. It guards against damage, not against
forgery (40 GB/s here; SHA-256 takes 1.5 GB/s and would slow every merge).
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
    """Hex digests of strips that follow one another in `data`; `sizes` in bytes."""
    view, at, found = data.data, 0, []
    for size in sizes:
        found.append(xxhash.xxh3_128_hexdigest(view[at : at + size]))
        at += size
    return tuple(found)


def tensor_checksum(checksums: Iterable[str]) -> str:
    """Hex digest of a whole tensor from those of its strips, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(bytes.fromhex(one) for one in checksums))


def git_sha1(data: bytes) -> str:
    """The name that git, and so the Hub, gives a small file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()
