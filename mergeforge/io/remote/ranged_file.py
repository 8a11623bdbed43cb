"""RemoteFile: an input file whose bytes are fetched by ranges."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Protocol

from mergeforge.errors import SourceError
from mergeforge.io.remote.session import RemoteSession

REQUEST_NBYTES = 4 << 20  # the size of one request, if there is more to fetch
CHUNK_NBYTES = 512 << 10  # smaller ranges are fetched as aligned, cached chunks: headers, norms, LoRA factors
WHOLE_FILE_NBYTES = 1 << 20  # smaller files are fetched whole and compared with their sha256


class Ranges(Protocol):
    """The source of a file's bytes, pinned to the state in which it was opened."""

    @property
    def path(self) -> str:
        """Its URL for messages and receipts, without secrets."""

    @property
    def size(self) -> int: ...

    @property
    def etag(self) -> str:
        """A value that changes with the content; "" if unknown."""

    @property
    def sha256(self) -> str:
        """The sha256 of the whole content; "" if unknown."""

    def fetch(self, buffer: memoryview, offset: int, stopped: threading.Event) -> None:
        """Fill the buffer, with retries. Raises SourceError."""

    def check(self) -> None:
        """Raise SourceError if the file is known to have changed."""


class RemoteFile:
    """A remote input file, read by all threads."""

    def __init__(self, ranges: Ranges, session: RemoteSession) -> None:
        self.ranges = ranges
        self.session = session

    @property
    def path(self) -> str:
        return self.ranges.path

    @property
    def size(self) -> int:
        return self.ranges.size

    @property
    def identity(self) -> tuple[str, int, str]:
        return (self.path, self.size, self.ranges.etag)

    def read_into(self, buffer: memoryview, offset: int, *, keep: bool = False) -> None:
        """Fill `buffer` from `offset`; small ranges, and those to `keep`, are cached. Raises SourceError."""
        stop = offset + len(buffer)
        if stop > self.size:
            raise SourceError(f"{self.path} ends at byte {self.size}, but bytes up to {stop} are needed")
        if self.size <= WHOLE_FILE_NBYTES or len(buffer) <= CHUNK_NBYTES:
            for first, last in self._chunks(offset, stop):
                self._copy(buffer, offset, first, last)
        elif keep and len(buffer) <= self.session.cache.nbytes // 4:
            self._copy(buffer, offset, offset, stop)
        else:
            self._fetch(buffer, offset)

    def check_unchanged(self) -> None:
        self.ranges.check()

    def close(self) -> None:
        """Interrupt threads that wait for data."""
        self.session.interrupt()

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = self.size if self.size <= WHOLE_FILE_NBYTES else CHUNK_NBYTES
        for first in range(start - start % step, stop, step) if step else ():
            yield first, min(first + step, self.size)

    def _copy(self, buffer: memoryview, offset: int, first: int, last: int) -> None:
        """Copy the part of a cached range that the buffer needs."""
        data = self.session.cache.get((self.path, self.ranges.etag, first, last), lambda: self._read_range(first, last))
        start, stop = max(offset, first), min(offset + len(buffer), last)
        buffer[start - offset : stop - offset] = memoryview(data)[start - first : stop - first]

    def _read_range(self, first: int, last: int) -> bytes:
        data = bytearray(last - first)
        self._fetch(memoryview(data), first)
        if len(data) == self.size and not self._is_sound(data):
            self._fetch(memoryview(data), first)
            if not self._is_sound(data):
                hint = "something between this machine and the server may be modifying the data"
                raise SourceError(f"{self.path} came damaged twice", hint=hint)
        return bytes(data)

    def _is_sound(self, data: bytearray) -> bool:
        return self.ranges.sha256 in ("", hashlib.sha256(data).hexdigest())

    def _fetch(self, buffer: memoryview, offset: int) -> None:
        """Fetch several pieces at once: the first one here, the others in the session's threads."""
        stopped = self.session.stopped
        step = -(-len(buffer) // max(1, -(-len(buffer) // REQUEST_NBYTES)))
        others = [
            self.session.pool.submit(self.ranges.fetch, buffer[start : start + step], offset + start, stopped)
            for start in range(step, len(buffer), step)
        ]
        try:
            self.ranges.fetch(buffer[:step], offset, stopped)
        finally:
            wait(others)  # until then they write into the buffer
        for future in others:
            future.result()
