"""Layout: the output files, their headers and sizes, and the extent of each tensor.

The layout is computed from headers alone before anything is written; OutputFiles then fills the files at their
offsets, in any order, from any number of threads.
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
    """The position of a tensor: file name, first byte, number of bytes."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its header, its total size, and other bytes known in advance (offset -> bytes)."""

    header: bytes
    nbytes: int
    known_bytes: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """All files by name, and the extent of every tensor in the order of the files."""

    files: Mapping[str, OutputFile]
    extents: Mapping[str, Extent]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())


class OutputFiles:
    """Files in a folder, open for writing at known offsets.

    New files get their full size and their header at once; files of an interrupted run are reused unless they are too
    large. Raises BudgetError if the disk is full.
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
                os.ftruncate(fd, 0)  # not written by an earlier run of this merge
            preallocate(fd, file.nbytes, str(path))
            for offset, content in {0: file.header, **file.known_bytes}.items():
                write_at(fd, memoryview(content), offset, str(path))

    def write(self, name: str, data: NDArray[np.uint8], offset: int, behind: WriteBehind) -> None:
        """Write bytes at `offset` of a file."""
        fd = self._fds[name]
        write_at(fd, data.data, offset, str(self.folder / name))
        behind.written(fd, offset, len(data))

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
