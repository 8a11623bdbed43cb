"""Link: what the remote files of one merge share."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

STREAMS = 16  # pieces that are fetched at once


class RemoteSession:
    """Threads that fetch pieces, the ranges that are kept, and folders for the small files beside weights."""

    def __init__(self, kept_nbytes: int) -> None:
        self.kept = Kept(kept_nbytes)
        self.stopped = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def pool(self) -> ThreadPoolExecutor:
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(STREAMS, thread_name_prefix="link")
            return self._pool

    def interrupt(self) -> None:
        """End the waits of everything that is being read now; what is read later is not concerned."""
        with self._lock:
            self.stopped.set()
            self.stopped = threading.Event()

    def folder(self) -> Path:
        """A new folder that lives as long as the link."""
        path = tempfile.mkdtemp(prefix="mergeforge-")
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return Path(path)


class Kept:
    """Byte ranges by key, fetched once for however many threads ask; the oldest go when `nbytes` are passed."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._held: OrderedDict[Hashable, bytes] = OrderedDict()
        self._coming: dict[Hashable, Future[bytes]] = {}
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, fetch: Callable[[], bytes]) -> bytes:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            coming = self._coming.get(key)
            mine = coming is None
            if coming is None:
                coming = self._coming[key] = Future()
        if mine:
            self._fill(key, coming, fetch)
        return coming.result()

    def _fill(self, key: Hashable, coming: Future[bytes], fetch: Callable[[], bytes]) -> None:
        try:
            data = fetch()
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            coming.set_exception(error)
            return
        with self._lock:
            del self._coming[key]
            self._held[key] = data
            self._used += len(data)
            while self._used > self.nbytes and len(self._held) > 1:
                self._used -= len(self._held.popitem(last=False)[1])
        coming.set_result(data)
