"""Worker: what one thread owns. Its staging buffer, scratch blocks and CUDA stream are allocated once and reused.

Fresh memory is slow (the first touch of a page costs 20-60 times a later one on a virtual machine), and with several
threads glibc keeps freed memory; so nothing is allocated per tile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from mergeforge.core.tensor_info import BLOCK_ELEMENTS, torch_dtype
from mergeforge.io.disk import InputFile, WriteBehind

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]

T = TypeVar("T")
ALIGNMENT = 64  # bytes; every allocation in a staging buffer starts at a multiple of it
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


class Worker:
    """One thread's device, staging buffer, scratch blocks and, on CUDA, stream.

    On CUDA the staging buffer is pinned and has a twin on the device: input bytes are copied there on the worker's own
    stream, and results come back into the staging buffer. With several workers, the disk time of one overlaps the bus
    and compute time of another.

    `merges_natively`, `counts_natively`: the plan chose the C library for the tensor that is computed now, or at least
    for counting its magnitudes.
    """

    def __init__(self, device: str, staging_nbytes: int) -> None:
        self.device = device
        self.merges_natively = self.counts_natively = False
        self.write_behind = WriteBehind()
        self.stream: Any = None
        self._staging, self._device_staging = self._buffers(staging_nbytes + ALIGNMENT)
        self._used = self._start = -self._staging.ctypes.data % ALIGNMENT
        self._cache: dict[Hashable, Any] = {}
        self._scratch: list[Tensor] = []
        self._slots = 0
        self.will_reread = False  # what is read now is read again soon, so the page cache keeps it

    def _buffers(self, nbytes: int) -> tuple[Bytes, Tensor | None]:
        """The staging buffer and its twin on the device, if any; also creates the stream."""
        if self.device == "cpu":
            import numpy as np

            return np.empty(nbytes, np.uint8), None
        import torch

        pinned = self.device.startswith("cuda")
        if pinned:
            make_stream: Any = torch.cuda.Stream  # untyped in torch
            self.stream = make_stream(self.device)
        staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return staging.numpy(), torch.empty_like(staging, device=self.device)

    def clear(self) -> None:
        """Free the staging buffer and the scratch blocks for the next tile."""
        self.wait()
        self._used = self._start
        self._cache.clear()
        self.reset_scratch()

    def reset_scratch(self) -> None:
        """Reuse the scratch blocks, but keep the staged bytes."""
        self._slots = 0

    def next_slot(self) -> int:
        """The number of a scratch block that is not handed out again until the next reset_scratch()."""
        self._slots += 1
        return self._slots - 1

    def wait(self) -> None:
        """Wait until the device has finished this worker's work."""
        if self.stream is not None:
            self.stream.synchronize()

    def allocate(self, nbytes: int) -> Bytes:
        """`nbytes` of the staging buffer, valid until the next clear()."""
        buffer = self._staging[self._used : self._used + nbytes]
        if len(buffer) < nbytes:
            raise AssertionError(f"staging: {nbytes} bytes more than planned")  # a bug in the plan
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return buffer

    def allocate_tensor(self, nbytes: int) -> tuple[Tensor, Tensor]:
        """`nbytes` of the staging buffer and of its twin on the device; on a CPU both are the same tensor."""
        offset = self._used
        self.allocate(nbytes)
        host = self._staging_tensor[offset : offset + nbytes]
        return host, host if self._device_staging is None else self._device_staging[offset : offset + nbytes]

    @cached_property
    def _staging_tensor(self) -> Tensor:
        """The staging buffer as a torch tensor."""
        import torch

        return torch.from_numpy(self._staging)

    def read(self, file: InputFile, offset: int, nbytes: int, *, keep: bool = False) -> Tensor:
        """Bytes of a file, on the device. The same range is read only once until clear().

        `keep`: leave the range in the page cache, because other tiles need it too.
        """

        def fetch() -> Tensor:
            host, on_device = self.allocate_tensor(nbytes)
            file.read_into(host.numpy().data, offset, keep=keep or self.will_reread)
            return host if on_device is host else on_device.copy_(host, non_blocking=True)

        return self.cached((file.path, offset, nbytes), fetch)

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, computed once per key until clear()."""
        if key not in self._cache:
            self._cache[key] = make()
        value: T = self._cache[key]
        return value

    def mark(self) -> tuple[int, int, int]:
        """The fill level of the staging buffer, the cache and the scratch blocks, for release()."""
        return self._used, len(self._cache), self._slots

    def release(self, mark: tuple[int, int, int]) -> None:
        """Free everything that was staged or handed out since the mark."""
        self.wait()  # a copy to the device may still read the buffer
        self._used, cached, self._slots = mark
        while len(self._cache) > cached:
            self._cache.popitem()

    def scratch(self, slot: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The slot's reused temporary in the given shape (at most one block); its old content is lost."""
        import torch

        while len(self._scratch) <= slot:
            self._scratch.append(torch.empty(0, dtype=dtype, device=self.device))
        numel = shape[0] * shape[1]
        if self._scratch[slot].numel() < numel or self._scratch[slot].dtype != dtype:
            self._scratch[slot] = torch.empty(max(numel, BLOCK_ELEMENTS), dtype=dtype, device=self.device)
        return self._scratch[slot][:numel].view(shape)


@contextmanager
def single_torch_thread(needed: bool = True) -> Iterator[None]:
    """Let torch compute with one thread inside the block; does nothing unless `needed`.

    More threads change the last bits of sums, and the parallelism comes from the tiles.
    """
    if not needed:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Keep glibc from returning each freed block to the system: fresh pages are slow pages.

    By default, blocks above 128 KB (a limit that moves) are mapped and unmapped each time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def view_rows(raw: Tensor, dtype: str, columns: int) -> Tensor:
    """Raw bytes as rows of a tensor of the safetensors dtype."""
    known = torch_dtype(dtype)
    assert known is not None, dtype
    return raw.view(known).view(-1, columns)
