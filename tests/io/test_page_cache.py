"""The page cache: what it held before a file is read stays there, what reading brings in goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergeforge.io.disk import DiskFile, is_cached

SIZE = 8 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that lies on the disk and in the page cache."""
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.write(bytes(SIZE))
        file.flush()
        os.fsync(file.fileno())
    if not cached(path):
        pytest.skip("this system does not tell what its page cache holds")
    return path


def cached(path: Path) -> bool:
    with open(path, "rb") as file:
        return is_cached(file.fileno(), SIZE)


def read(path: Path) -> None:
    file = DiskFile(path)
    file.read_into(memoryview(bytearray(SIZE)), 0)
    file.close()


def test_what_was_cached_stays(path: Path) -> None:
    read(path)
    assert cached(path)


def test_what_reading_brings_in_goes(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not cached(path)
    read(path)
    assert not cached(path)
