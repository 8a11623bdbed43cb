"""Where every output byte goes: files, their headers and sizes, and each tensor's extent.

Decided from headers alone before anything is written; OutputFiles then fills the files at their
offsets, in any order, by any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.io.disk import WriteBehind, disk_error, preallocate, read_into, sync_file, write_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Extent:
    """A tensor's place: file name, first byte, bytes."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its first bytes, its whole size, and what else is known of it (offset -> bytes)."""

    header: bytes
    nbytes: int
    known: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """All files by name, and every tensor's extent in the order of the files."""

    files: Mapping[str, OutputFile]
    extents: Mapping[str, Extent]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())


class OutputFiles:
    """Files in a folder, open for writing at known offsets.

    New files get their whole size and header at once; files of an interrupted run are taken over
    when their size is right. Raises BudgetError when the disk is full.
    """

    def __init__(self, folder: Path, files: Mapping[str, OutputFile]) -> None:
        self.folder = folder
        self.files = files
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def open(self) -> None:
        for name, file in self.files.items():
            path = self.folder / name
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            try:
                fd = os.open(path, flags, 0o666)
            except OSError as error:
                raise disk_error(error, str(path)) from error
            self._fds[name] = fd
            if os.fstat(fd).st_size > file.nbytes:
                os.ftruncate(fd, 0)  # not what an earlier run of this merge left
            preallocate(fd, file.nbytes, str(path))
            for offset, content in {0: file.header, **file.known}.items():
                write_at(fd, memoryview(content), offset, str(path))

    def write(self, name: str, data: NDArray[np.uint8], offset: int, behind: WriteBehind) -> None:
        """Write bytes at `offset` of the file."""
        fd = self._fds[name]
        write_at(fd, data.data, offset, str(self.folder / name))
        behind.wrote(fd, offset, len(data))

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        read_into(self._fds[name], buffer, offset, str(self.folder / name))

    def sync(self) -> None:
        """Make everything that was written durable."""
        with self._lock:
            for name, fd in self._fds.items():
                sync_file(fd, str(self.folder / name))

    def close(self) -> None:
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
