"""The page cache: a file that was cached before it is read stays cached; otherwise it is dropped again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergeforge.io.disk import DiskFile, is_cached

SIZE = 8 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is on the disk and in the page cache."""
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.write(bytes(SIZE))
        file.flush()
        os.fsync(file.fileno())
    if not cached(path):
        pytest.skip("this system does not report the state of its page cache")
    return path


def cached(path: Path) -> bool:
    with open(path, "rb") as file:
        return is_cached(file.fileno(), SIZE)


def read(path: Path) -> None:
    file = DiskFile(path)
    file.read_into(memoryview(bytearray(SIZE)), 0)
    file.close()


def test_keeps_a_file_that_was_cached(path: Path) -> None:
    read(path)
    assert cached(path)


def test_drops_a_file_that_was_not_cached(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not cached(path)
    read(path)
    assert not cached(path)
