"""A folder in what fsspec knows: s3, gs, az, sftp, memory, and so on, each with the package that it needs.

fsspec's answers carry no etag, so what a file is (size, etag, times: what its file system tells) is asked again
after reading, before what was computed from it counts.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from mergeforge.errors import MissingExtraError, SourceError
from mergeforge.io.remote.ranged_file import RemoteFile
from mergeforge.io.remote.retry import Patience, reason
from mergeforge.io.remote.session import RemoteSession

PIECE = 4 << 20  # fsspec hands out bytes of its own: no more than this at once for each reading thread
LARGEST = 256 << 20  # of what is read whole
_TELLING: tuple[str, ...] = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated")
_TELLING += ("mtime", "created", "modified", "ino")
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError)


class FilesystemPlace:
    """A folder by its fsspec URL."""

    def __init__(self, url: str, link: RemoteSession) -> None:
        self.url = url
        self.link = link
        self._fs, self._root = _filesystem(url)

    def names(self, stems: Sequence[str]) -> list[str]:
        try:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._root, detail=True)
        except Exception as error:  # each file system has its own
            raise _refused(self.url, error) from None
        files = [str(one["name"]) for one in entries if one.get("type") != "directory"]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in files)

    def read(self, name: str) -> bytes:
        opened = self.open(name)
        if opened.size > LARGEST:
            raise SourceError(f"{self.url}/{name} is too large to lie beside weights")
        data = bytearray(opened.size)
        opened.ranges.fetch(memoryview(data), 0, self.link.stopped)
        return bytes(data)

    def open(self, name: str) -> RemoteFile:
        return RemoteFile(FilesystemRanges(self._fs, f"{self._root}/{name}", f"{self.url}/{name}"), self.link)


class FilesystemRanges:
    """A file of an fsspec file system, as it was when it was opened."""

    sha256 = ""

    def __init__(self, fs: Any, at: str, path: str) -> None:
        self.path = path
        self._fs = fs
        self._at = at
        self._info = self._told()
        self._read = False

    @property
    def size(self) -> int:
        return int(self._info["size"])

    @property
    def etag(self) -> str:
        return self._info["etag"]

    def fetch(self, buffer: memoryview, offset: int, stopped: threading.Event) -> None:
        self._read = True
        for at in range(0, len(buffer), PIECE):
            piece = buffer[at : at + PIECE]
            piece[:] = self._range(offset + at, offset + at + len(piece), Patience(self.path, stopped))

    def check(self) -> None:
        """Ask what the file is now, if it was read since the last time."""
        if self._read:
            self._read = False
            if self._told() != self._info:
                raise SourceError(f"{self.path} changed while it was read", hint="run again once nobody writes to it")

    def _range(self, start: int, stop: int, patience: Patience) -> bytes:
        while True:
            try:
                data = bytes(self._fs.cat_file(self._at, start=start, end=stop))
            except _LASTING as error:
                raise _refused(self.path, error) from None
            except Exception as error:  # of whichever library; they tell passing failures from lasting ones badly
                patience.wait(error)
                continue
            if len(data) == stop - start:
                return data
            self.check()
            patience.wait(EOFError(f"{len(data)} bytes came, {stop - start} were asked for"))

    def _told(self) -> dict[str, str]:
        """Size and whatever else tells one content from another."""
        try:
            self._fs.invalidate_cache(self._fs._parent(self._at))
            info: Mapping[str, Any] = self._fs.info(self._at)
        except Exception as error:
            raise _refused(self.path, error) from None
        if not isinstance(info.get("size"), int):
            raise SourceError(f"{self.path} is no file whose size can be told")
        told = [f"{key}={info[key]}" for key in _TELLING if info.get(key) is not None]
        return {"size": str(info["size"]), "etag": " ".join(told)}


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise MissingExtraError(f"{url} needs fsspec", hint="pip install 'mergeforge[remote]'") from None
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(f"{url}: {reason(error)}", hint="pip install what it names") from None
    except Exception as error:
        raise _refused(url, error) from None
    return fs, str(root).rstrip("/")


def _refused(path: str, error: Exception) -> SourceError:
    hint = "credentials come from the environment, as the service's own tools take them"
    return SourceError(f"{path} cannot be read: {type(error).__name__}: {reason(error)}", hint=hint)
