"""RemoteSession: what the remote files of one merge share."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

STREAMS = 16  # requests at once


class RemoteSession:
    """Threads that fetch, the cache of ranges, and temporary folders for the small files next to weights."""

    def __init__(self, cache_nbytes: int) -> None:
        self.cache = RangeCache(cache_nbytes)
        self.stopped = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def pool(self) -> ThreadPoolExecutor:
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(STREAMS, thread_name_prefix="remote")
            return self._pool

    def interrupt(self) -> None:
        """Interrupt all current reads; later reads are not affected."""
        with self._lock:
            self.stopped.set()
            self.stopped = threading.Event()

    def temporary_folder(self) -> Path:
        """Create a folder that is removed with this session."""
        path = tempfile.mkdtemp(prefix="mergeforge-")
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return Path(path)


class RangeCache:
    """Byte ranges by key, each fetched once for all threads; the least recently used are dropped above `nbytes`."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._cached: OrderedDict[Hashable, bytes] = OrderedDict()
        self._pending: dict[Hashable, Future[bytes]] = {}
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, fetch: Callable[[], bytes]) -> bytes:
        with self._lock:
            if key in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key]
            pending = self._pending.get(key)
            is_first = pending is None
            if pending is None:
                pending = self._pending[key] = Future()
        if is_first:
            self._fill(key, pending, fetch)
        return pending.result()

    def _fill(self, key: Hashable, pending: Future[bytes], fetch: Callable[[], bytes]) -> None:
        try:
            data = fetch()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            pending.set_exception(error)
            return
        with self._lock:
            del self._pending[key]
            self._cached[key] = data
            self._used += len(data)
            while self._used > self.nbytes and len(self._cached) > 1:
                self._used -= len(self._cached.popitem(last=False)[1])
        pending.set_result(data)
