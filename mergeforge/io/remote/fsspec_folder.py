"""FsspecFolder: a folder in a file system of fsspec (s3, gs, az, sftp, memory, ...), each with the package it needs.

Data read through fsspec carries no etag, so the state of a file (size, etag, times, as far as the file system knows
them) is queried again after reading, before results are recorded as finished.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergeforge.errors import MissingExtraError, SourceError, pip_install
from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.retry import RetryPolicy, reason
from mergeforge.io.remote.session import RemoteSession

PIECE_NBYTES = 4 << 20  # fsspec allocates its own bytes: read no more than this at once per thread
MAX_SMALL_FILE = 256 << 20  # bytes of a file that is read whole
_STATE_KEYS: tuple[str, ...] = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated")
_STATE_KEYS += ("mtime", "created", "modified", "ino")
_PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
)


class FsspecFolder:
    """A folder by its fsspec URL."""

    def __init__(self, url: str, session: RemoteSession) -> None:
        self.url = url
        self.session = session
        self._fs, self._root = _filesystem(url)

    def names(self, stems: Sequence[str]) -> list[str]:
        try:
            self._fs.invalidate_cache()
            return sorted(self._names(self._root, depth=2))
        except Exception as error:  # each file system has its own exceptions
            raise _refused(self.url, error) from None

    def _names(self, folder: str, depth: int) -> Iterator[str]:
        """The names of the files in a folder, and in its subfolders to a depth."""
        for entry in self._fs.ls(folder, detail=True):
            path = str(entry["name"]).rstrip("/")
            name = path.rpartition("/")[2]
            if entry.get("type") != "directory":
                yield name
            elif depth > 1 and not name.startswith(".") and path != folder:
                yield from (f"{name}/{inner}" for inner in self._names(path, depth - 1))

    def read(self, name: str) -> bytes:
        file = self.open(name)
        if file.size > MAX_SMALL_FILE:
            raise SourceError(f"{self.url}/{name} is too large for a file next to weights")
        data = bytearray(file.size)
        file.ranges.fetch(memoryview(data), 0, self.session.stopped)
        return bytes(data)

    def open(self, name: str) -> RemoteFile:
        return RemoteFile(FsspecRanges(self._fs, f"{self._root}/{name}", f"{self.url}/{name}"), self.session)


class FsspecRanges:
    """A file of an fsspec file system, pinned to its state when it was opened."""

    sha256 = ""

    def __init__(self, fs: Any, location: str, path: str) -> None:
        self.path = path
        self._fs = fs
        self._location = location
        self._info = self._stat()
        self._read = False

    @property
    def size(self) -> int:
        return int(self._info["size"])

    @property
    def etag(self) -> str:
        return self._info["etag"]

    def fetch(self, buffer: memoryview, offset: int, stopped: threading.Event) -> None:
        self._read = True
        for start in range(0, len(buffer), PIECE_NBYTES):
            piece = buffer[start : start + PIECE_NBYTES]
            piece[:] = self._range(offset + start, offset + start + len(piece), RetryPolicy(self.path, stopped))

    def check(self) -> None:
        """Query the state of the file if it was read since the last check. Raises SourceError if it changed."""
        if self._read:
            self._read = False
            if self._stat() != self._info:
                raise SourceError(f"{self.path} changed while it was read", hint="run again when nothing writes to it")

    def _range(self, start: int, stop: int, policy: RetryPolicy) -> bytes:
        while True:
            try:
                data = bytes(self._fs.cat_file(self._location, start=start, end=stop))
            except _PERMANENT_ERRORS as error:
                raise _refused(self.path, error) from None
            except Exception as error:  # of any library; few distinguish temporary failures from permanent ones
                policy.wait(error)
                continue
            if len(data) == stop - start:
                return data
            self.check()
            policy.wait(EOFError(f"{len(data)} bytes came, {stop - start} were requested"))

    def _stat(self) -> dict[str, str]:
        """Size, and all other values that change with the content."""
        try:
            self._fs.invalidate_cache(self._fs._parent(self._location))
            info: Mapping[str, Any] = self._fs.info(self._location)
        except Exception as error:
            raise _refused(self.path, error) from None
        if not isinstance(info.get("size"), int):
            raise SourceError(f"{self.path} is not a file with a known size")
        state = [f"{key}={info[key]}" for key in _STATE_KEYS if info.get(key) is not None]
        return {"size": str(info["size"]), "etag": " ".join(state)}


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise MissingExtraError(f"{url} needs fsspec", hint=pip_install("fsspec")) from None
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(f"{url}: {reason(error)}", hint="pip install the package that it names") from None
    except Exception as error:
        raise _refused(url, error) from None
    return fs, str(root).rstrip("/")


def _refused(path: str, error: Exception) -> SourceError:
    hint = "credentials come from the environment, as for the service's own tools"
    return SourceError(f"{path} cannot be read: {type(error).__name__}: {reason(error)}", hint=hint)
