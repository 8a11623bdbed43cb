"""Read and write at known offsets without filling the page cache.

On a virtual machine the first touch of a page costs 20-60 times a later one, so streaming gigabytes through new
page-cache pages is what makes `cp` slow. Here, pages are dropped after they are read; written pages are sent to the
disk immediately and dropped a few tiles later. On systems without these calls, plain reads and writes are used.
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

WINDOW = 8  # written ranges per thread that may be in write-back at once
PROBES = 64  # bytes of a file that are probed to see whether it is in the page cache
FOLIO = 2 << 20  # the largest unit of the page cache; dropping part of one splits it, which is slow
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # SYNC_FILE_RANGE_*, linux/fs.h
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE: tuple[int, ...] = (errno.EACCES, errno.EPERM, errno.EROFS)  # not permitted, or no such path
_NOT_WRITABLE += (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)


def _libc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name, None)
    except (OSError, TypeError):
        return None


_sync_file_range = _libc("sync_file_range")
_fallocate = _libc("fallocate")


def read_into(fd: int, buffer: memoryview, offset: int, path: str, *, keep: bool = False) -> None:
    """Fill `buffer` from `offset`, then drop the range from the page cache (unless `keep`).

    Raises SourceError if the file is too short.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise SourceError(
                f"{path} ends at byte {offset + done}; it changed while it was read", hint="run the same command again"
            )
        done += count
    if not keep:
        drop_cached(fd, offset, len(buffer))


def is_cached(fd: int, nbytes: int) -> bool:
    """Whether the page cache holds a file, judging by PROBES of its bytes."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return all(os.preadv(fd, [bytearray(1)], nbytes * index // PROBES, os.RWF_NOWAIT) for index in range(PROBES))
    except OSError:  # it would have to be read from the disk, or the file system cannot tell
        return False


def drop_cached(fd: int, offset: int, nbytes: int) -> None:
    """Drop a range from the page cache, except its last incomplete folio, which goes with the next range."""
    first, last = offset & -FOLIO, offset + nbytes & -FOLIO
    if last > first and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_DONTNEED)


def write_at(fd: int, buffer: memoryview, offset: int, path: str) -> None:
    """Write all of `buffer` at `offset`. Raises BudgetError if the disk is full."""
    done = 0
    while done < len(buffer):
        try:
            done += os.pwrite(fd, buffer[done:], offset + done)
        except OSError as error:
            raise disk_error(error, path) from error


def preallocate(fd: int, nbytes: int, path: str) -> None:
    """Reserve the file's blocks, so that a full disk is detected now and not halfway through."""
    try:
        if _fallocate is not None:
            if _fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(nbytes)) == 0:
                return
            code = ctypes.get_errno()
            if code in _DISK_FULL:
                raise OSError(code, os.strerror(code))
        os.ftruncate(fd, nbytes)  # the file system cannot reserve blocks
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: str) -> MergeforgeError:
    """The error for a path that cannot be written: a BudgetError for a full disk or quota."""
    if error.errno in _DISK_FULL:
        reasons = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "files may not be that large"}
        message = f"{reasons.get(error.errno or 0, 'no space left on the disk')}: {path}"
        return BudgetError(message, hint="make room, then run the same command again to resume")
    if error.errno in _NOT_WRITABLE:
        return OutputError(f"{path} cannot be written: {error.strerror}", hint="write elsewhere with --out DIR")
    hint = "the disk or its file system failed; run the same command again to resume once it works"
    return MergeforgeError(f"{path} cannot be written: {error.strerror}", hint=hint)


def is_same_file(fd: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def on_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside the block into one of our errors, which names the file, or `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, str(error.filename or os.fspath(path))) from error


class WriteBehind:
    """Starts write-back early, a few ranges behind the writer; one per thread.

    `written` starts the write-back of a range and, WINDOW ranges later, waits for it and drops its pages, so that dirty
    memory stays bounded and the final fsync has little to do. This only affects speed; the fsync makes data durable.
    """

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, int, int]] = deque()

    def written(self, fd: int, offset: int, nbytes: int) -> None:
        """Start the write-back of a range that was just written."""
        if _sync_file_range is None:
            return
        _call_libc(_sync_file_range, fd, offset, nbytes, _WRITE)
        self._ranges.append((fd, offset, nbytes))
        if len(self._ranges) > WINDOW:
            fd, offset, nbytes = self._ranges.popleft()
            _call_libc(_sync_file_range, fd, offset, nbytes, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            drop_cached(fd, offset, nbytes)


def _call_libc(function: Callable[..., int], fd: int, offset: int, nbytes: int, flags: int) -> None:
    function(fd, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes), ctypes.c_uint(flags))


def sync_file(fd: int, path: str) -> None:
    """Make everything written to the file durable. An error is final: the kernel drops the pages it could not write."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise disk_error(error, path) from error


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make the entries of a folder (renames, new files) durable, if the file system supports it."""
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
    """Write a small file so that it is complete or absent: temporary file, fsync, rename, fsync of the folder."""
    path = os.fspath(path)
    temporary = f"{path}.part"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            write_at(fd, memoryview(data), 0, temporary)
            sync_file(fd, temporary)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    except OSError as error:
        raise disk_error(error, path) from error


class InputFile(Protocol):
    """A file that all threads read tiles from: on a disk, or remote (remote/)."""

    @property
    def path(self) -> str:
        """Its name in messages; the path of a local file."""

    @property
    def identity(self) -> tuple[Any, int, Any]:
        """Where it is, its size, and a value that changes with its content."""

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: memoryview, offset: int, *, keep: bool = False) -> None:
        """Fill `buffer` from `offset`; `keep`: cache the range, which will soon be read again."""

    def check_unchanged(self) -> None:
        """Raise SourceError if the file has changed since its header was read."""

    def close(self) -> None: ...


class DiskFile:
    """An input file on a disk, opened at the first read and shared by all threads.

    Remembers the state of the file when its header was read; `check_unchanged` raises SourceError if it was modified
    since. A file that was in the page cache stays there; otherwise what is read is dropped from it.
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
        """Fill `buffer` from `offset`; `keep`: leave the range in the page cache."""
        try:
            read_into(self.descriptor(), buffer, offset, self.path, keep=keep or self._was_cached)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error

    def release(self, offset: int, nbytes: int) -> None:
        """Drop a range from the page cache after it was read through descriptor()."""
        if not self._was_cached:
            drop_cached(self.descriptor(), offset, nbytes)

    def check_unchanged(self) -> None:
        try:
            now = self._identity(os.stat(self.path))
        except OSError:
            now = None
        if now != self.identity:
            raise SourceError(f"{self.path} changed while it was read", hint="run again when nothing writes to it")

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def descriptor(self) -> int:
        """The file descriptor; opens the file if needed."""
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
