"""Reading and writing at known offsets without filling the page cache.

On a virtual machine the first touch of a page costs 20-60 times a later one, so streaming gigabytes
through fresh page-cache pages is what makes `cp` slow. Here read pages are dropped behind the
reader, and written ones are sent to the disk at once and dropped a few tiles later. On systems
without these calls everything still works, as plain reads and writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mergeforge.errors import BudgetError, MergeforgeError, OutputError, SourceError

WINDOW = 8  # written pieces that may be on their way to the disk at once, for each thread
PROBES = 64  # places of a file that tell whether it is in the page cache
FOLIO = 2 << 20  # the page cache holds files in pieces of up to this size; dropping part of one splits it, slowly
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # SYNC_FILE_RANGE_*, linux/fs.h
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WAY: tuple[int, ...] = (errno.EACCES, errno.EPERM, errno.EROFS)  # not allowed, or no such place
_NO_WAY += (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)


def _libc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name, None)
    except (OSError, TypeError):
        return None


_sync_file_range = _libc("sync_file_range")
_fallocate = _libc("fallocate")


def read_into(fd: int, buffer: memoryview, offset: int, path: str, *, keep: bool = False) -> None:
    """Fill `buffer` from `offset`, then let the page cache forget those pages (unless `keep`).

    Raises SourceError when the file ends before that.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise SourceError(f"{path} ends at byte {offset + done}; it changed while it was read", hint="run again")
        done += count
    if not keep:
        forget(fd, offset, len(buffer))


def is_cached(fd: int, nbytes: int) -> bool:
    """Whether the page cache holds a file already, as far as a look at a byte in each of PROBES places tells."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return all(os.preadv(fd, [bytearray(1)], nbytes * at // PROBES, os.RWF_NOWAIT) for at in range(PROBES))
    except OSError:  # it would have to be read from the disk, or the filesystem does not tell
        return False


def forget(fd: int, offset: int, nbytes: int) -> None:
    """Let the page cache drop a range; its last incomplete piece goes with the range that follows."""
    first, last = offset & -FOLIO, offset + nbytes & -FOLIO
    if last > first and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_DONTNEED)


def write_at(fd: int, buffer: memoryview, offset: int, path: str) -> None:
    """Write all of `buffer` at `offset`. Raises BudgetError when the disk is full."""
    done = 0
    while done < len(buffer):
        try:
            done += os.pwrite(fd, buffer[done:], offset + done)
        except OSError as error:
            raise disk_error(error, path) from error


def preallocate(fd: int, nbytes: int, path: str) -> None:
    """Reserve the file's blocks, so that a full disk is found now and not in the middle."""
    try:
        if _fallocate is not None:
            if _fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(nbytes)) == 0:
                return
            code = ctypes.get_errno()
            if code in _DISK_FULL:
                raise OSError(code, os.strerror(code))
        os.ftruncate(fd, nbytes)  # filesystems that cannot reserve
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: str) -> MergeforgeError:
    """What could not be written, and why: a BudgetError for a full disk or quota."""
    if error.errno in _DISK_FULL:
        what = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "files may not be that large"}
        message = f"{what.get(error.errno or 0, 'no space left on the disk')}: {path}"
        return BudgetError(message, hint="make room and run the same command again; it goes on where it stopped")
    if error.errno in _NO_WAY:
        return OutputError(f"{path} cannot be written: {error.strerror}", hint="write elsewhere with --out DIR")
    hint = "the disk or its filesystem failed; run the same command again once it works, it goes on where it stopped"
    return MergeforgeError(f"{path} cannot be written: {error.strerror}", hint=hint)


def is_same(fd: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def on_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses inside, as an error of ours that names the file, or `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, str(error.filename or os.fspath(path))) from error


class WriteBehind:
    """Sends what was written to the disk early, a few pieces behind; one for each thread.

    `wrote` starts the write-back of a piece and, WINDOW pieces later, waits for it and drops its
    pages, so that dirty memory stays bounded and the final fsync finds little to do. This speeds
    things up; what makes data durable is the fsync.
    """

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, int, int]] = deque()

    def wrote(self, fd: int, offset: int, nbytes: int) -> None:
        if _sync_file_range is None:
            return
        _call(_sync_file_range, fd, offset, nbytes, _WRITE)
        self._pieces.append((fd, offset, nbytes))
        if len(self._pieces) > WINDOW:
            fd, offset, nbytes = self._pieces.popleft()
            _call(_sync_file_range, fd, offset, nbytes, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            forget(fd, offset, nbytes)


def _call(function: Callable[..., int], fd: int, offset: int, nbytes: int, flags: int) -> None:
    function(fd, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes), ctypes.c_uint(flags))


def sync_file(fd: int, path: str) -> None:
    """Make everything written to the file durable. An error is final: the kernel drops what it could not write."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise disk_error(error, path) from error


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make the folder's entries (renames, new files) durable, where the filesystem can."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise disk_error(error, os.fspath(path)) from error


def write_durably(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file so that it is whole or absent: a sibling, fsync, rename, fsync of the folder."""
    path = os.fspath(path)
    beside = f"{path}.part"
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            write_at(fd, memoryview(data), 0, beside)
            sync_file(fd, beside)
        finally:
            os.close(fd)
        os.replace(beside, path)
        sync_folder(os.path.dirname(path) or ".")
    except OSError as error:
        raise disk_error(error, path) from error


class InputFile(Protocol):
    """A file that tiles are read from, by all threads: on a disk, or somewhere else (remote/)."""

    @property
    def path(self) -> str:
        """Its name for messages; a path where it lies on a disk."""

    @property
    def identity(self) -> tuple[Any, int, Any]:
        """Where it is, its size, and what changes when its content does."""

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: memoryview, offset: int, *, keep: bool = False) -> None:
        """Fill `buffer` from `offset`; `keep` at hand what will soon be read again."""

    def check_unchanged(self) -> None:
        """Raise SourceError when it is no longer what it was when its header was read."""

    def close(self) -> None: ...


class DiskFile:
    """An input on a disk: opened at the first read, shared by all threads.

    Remembers what the file was when its header was read; `check_unchanged` raises SourceError when
    it has been touched since. What the page cache held before stays there; what is read into it goes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.identity = self._identity(os.stat(self.path))
        self._fd: int | None = None
        self._was_cached = False
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return self.identity[1]

    def read_into(self, buffer: memoryview, offset: int, *, keep: bool = False) -> None:
        """Fill `buffer` from `offset`; `keep` what will soon be read again in the page cache."""
        try:
            read_into(self.descriptor(), buffer, offset, self.path, keep=keep or self._was_cached)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error

    def was_read(self, offset: int, nbytes: int) -> None:
        """Whoever reads by the descriptor() has done with a range: the page cache may forget it."""
        if not self._was_cached:
            forget(self.descriptor(), offset, nbytes)

    def check_unchanged(self) -> None:
        try:
            now = self._identity(os.stat(self.path))
        except OSError:
            now = None
        if now != self.identity:
            raise SourceError(f"{self.path} changed while it was read", hint="run again once nobody writes to it")

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def descriptor(self) -> int:
        """The open file."""
        with self._lock:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY)
                self._was_cached = is_cached(self._fd, self.size)
            return self._fd

    @staticmethod
    def _identity(stat: os.stat_result) -> tuple[int, int, int]:
        return (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()

    def __getstate__(self) -> Any:
        raise TypeError("an open file belongs to one process")
