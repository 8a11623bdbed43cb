#!/usr/bin/env python3
"""The lower bound: copy a checkpoint's weights as fast as this machine can, and fsync the result.

Two threads, reused 8 MB buffers, preadv and pwrite at known offsets, pages dropped behind the
reader, and windowed write-back (sync_file_range, then drop) behind the writer.

    python benchmarks/raw_copy.py FROM_DIR TO_DIR
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path

CHUNK = 8 << 20
WINDOW = 8
LIBC = ctypes.CDLL(None)


def copy(source: Path, target: Path, threads: int = 2) -> float:
    """Copy every *.safetensors of a folder; seconds, fsync included."""
    target.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    jobs, files = deque(), []
    for path in sorted(source.glob("*.safetensors")):
        read, size = os.open(path, os.O_RDONLY), path.stat().st_size
        write = os.open(target / path.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        LIBC.fallocate(write, 0, ctypes.c_long(0), ctypes.c_long(size))
        files += [read, write]
        jobs.extend((read, write, at, min(CHUNK, size - at)) for at in range(0, size, CHUNK))
    workers = [threading.Thread(target=_work, args=(jobs,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in files:
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - started


def _work(jobs: deque) -> None:
    buffer, pending = memoryview(mmap.mmap(-1, CHUNK)), deque()
    while jobs:
        try:
            read, write, at, size = jobs.popleft()
        except IndexError:
            return
        piece = buffer[:size]
        assert os.preadv(read, [piece], at) == size
        os.posix_fadvise(read, at, size, os.POSIX_FADV_DONTNEED)
        assert os.pwrite(write, piece, at) == size
        LIBC.sync_file_range(write, ctypes.c_long(at), ctypes.c_long(size), 2)
        pending.append((write, at, size))
        if len(pending) > WINDOW:
            write, at, size = pending.popleft()
            LIBC.sync_file_range(write, ctypes.c_long(at), ctypes.c_long(size), 7)
            os.posix_fadvise(write, at, size, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(f"{copy(Path(sys.argv[1]), Path(sys.argv[2])):.2f}")
