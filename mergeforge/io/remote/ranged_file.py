"""RemoteFile: an input file whose bytes are fetched by ranges."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Protocol

from mergeforge.errors import SourceError
from mergeforge.io.remote.session import RemoteSession

PIECE = 4 << 20  # what one request asks for, where there is more to fetch
CHUNK = 512 << 10  # ranges up to this size come in aligned chunks, which are kept: headers, norms, adapters' factors
WHOLE = 1 << 20  # files up to this size come whole, and are compared with their sha256


class Ranges(Protocol):
    """Where a file's bytes come from; fixed to the state that it was opened in."""

    @property
    def path(self) -> str:
        """Its address, for messages and receipts: without anything secret."""

    @property
    def size(self) -> int: ...

    @property
    def etag(self) -> str:
        """What changes when the content does; "" where nobody tells."""

    @property
    def sha256(self) -> str:
        """Of the whole content; "" where nobody tells."""

    def fetch(self, buffer: memoryview, offset: int, stopped: threading.Event) -> None:
        """Fill the buffer, however often that takes. Raises SourceError."""

    def check(self) -> None:
        """Raise SourceError when the file is known to have changed."""


class RemoteFile:
    """An input that lies elsewhere, read by all threads."""

    def __init__(self, ranges: Ranges, link: RemoteSession) -> None:
        self.ranges = ranges
        self.link = link

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
        """Fill `buffer` from `offset`; what is small, or to `keep`, is remembered. Raises SourceError."""
        stop = offset + len(buffer)
        if stop > self.size:
            raise SourceError(f"{self.path} ends at byte {self.size}, and {stop} are asked for")
        if self.size <= WHOLE or len(buffer) <= CHUNK:
            for first, last in self._chunks(offset, stop):
                self._copy(buffer, offset, first, last)
        elif keep and len(buffer) <= self.link.kept.nbytes // 4:
            self._copy(buffer, offset, offset, stop)
        else:
            self._fetch(buffer, offset)

    def check_unchanged(self) -> None:
        self.ranges.check()

    def close(self) -> None:
        """End the waits of threads that are reading."""
        self.link.interrupt()

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = self.size if self.size <= WHOLE else CHUNK
        for first in range(start - start % step, stop, step) if step else ():
            yield first, min(first + step, self.size)

    def _copy(self, buffer: memoryview, offset: int, first: int, last: int) -> None:
        """Copy what the buffer and a kept range have in common."""
        data = self.link.kept.get((self.path, self.ranges.etag, first, last), lambda: self._held(first, last))
        start, stop = max(offset, first), min(offset + len(buffer), last)
        buffer[start - offset : stop - offset] = memoryview(data)[start - first : stop - first]

    def _held(self, first: int, last: int) -> bytes:
        data = bytearray(last - first)
        self._fetch(memoryview(data), first)
        if len(data) == self.size and not self._is_sound(data):
            self._fetch(memoryview(data), first)
            if not self._is_sound(data):
                hint = "is something between here and there changing what it sends?"
                raise SourceError(f"{self.path} came damaged twice", hint=hint)
        return bytes(data)

    def _is_sound(self, data: bytearray) -> bool:
        return self.ranges.sha256 in ("", hashlib.sha256(data).hexdigest())

    def _fetch(self, buffer: memoryview, offset: int) -> None:
        """A few pieces at once: the first one here, the others in the link's threads."""
        stopped = self.link.stopped
        step = -(-len(buffer) // max(1, -(-len(buffer) // PIECE)))
        others = [
            self.link.pool.submit(self.ranges.fetch, buffer[at : at + step], offset + at, stopped)
            for at in range(step, len(buffer), step)
        ]
        try:
            self.ranges.fetch(buffer[:step], offset, stopped)
        finally:
            wait(others)  # until then they write into the buffer
        for one in others:
            one.result()
