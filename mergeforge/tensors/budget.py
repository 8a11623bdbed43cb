"""Budget: the memory, device and threads that a merge may use. Worker: what one thread owns.

The memory is split evenly among the workers. A worker's share holds its staging buffer (raw bytes
of one tile of every input and of the output) and the block-sized float32 temporaries of its
computation. The plan proves from the shapes that every tile fits; nothing is measured or guessed
while it runs.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergeforge.core.sizes import parse_size
from mergeforge.core.tensor_info import BLOCK_ELEMENTS, torch_dtype
from mergeforge.errors import BudgetError, RecipeError
from mergeforge.io.disk import InputFile, WriteBehind
from mergeforge.native import bindings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]

T = TypeVar("T")
DEVICES = Path("/dev")
GPU_DRIVERS = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd")  # NVIDIA's, on Tegra, in WSL, AMD's
ALIGNMENT = 64  # of every piece of a staging buffer, in bytes
MAX_THREADS = 8  # more only fight over the disk
DEFAULT_MEMORY = 2 << 30
MIN_MEMORY = 16 << 20
STREAMING_THREADS = 8  # workers at least, where they wait for the network, as far as each gets STREAMING_SHARE
STREAMING_SHARE = 32 << 20
MAX_REMOTE_CACHE = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


@dataclass(frozen=True)
class Budget:
    """Working memory in bytes, torch device name, number of workers (0: as many as fit).

    `kept`: the part of the memory that is set aside for inputs that lie elsewhere; 0 where all lie here.
    """

    memory: int
    device: str
    threads: int = 0
    remote_cache: int = 0

    @property
    def per_worker(self) -> int:
        return (self.memory - self.remote_cache) // max(self.threads, 1)

    @property
    def max_threads(self) -> int:
        """The workers that make sense: one a processor, and more where they wait for the network."""
        waiting = min(STREAMING_THREADS, self.memory // STREAMING_SHARE) if self.remote_cache else 0
        return min(max(cores(), waiting), MAX_THREADS)

    @property
    def buffer_copies(self) -> int:
        """How often what is staged exists: on the host, and on a device if there is one."""
        return 1 if self.device == "cpu" else 2


def make_budget(memory: str | int | None = None, device: str = "auto", threads: int | None = None) -> Budget:
    """Read the user's options; `auto` takes CUDA where there is one.

    Raises RecipeError for a size, device or count that makes no sense.
    """
    try:
        given = parse_size(memory) if memory is not None else None
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from None
    if given is not None and given < MIN_MEMORY:
        raise BudgetError(f"--memory {memory} is too little for any merge", hint="give at least 16MiB")
    if threads is not None and threads < 1:
        raise RecipeError(f"--threads must be at least 1, not {threads}")
    device = _device(device)
    return Budget(given or _default_memory(device), device, threads or 0)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_memory() -> int:
    """This process's memory now (its peak where the system does not tell)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int:
    """Bytes of memory that are available without swapping; a guess of 4 GiB where nobody tells."""
    try:
        with open("/proc/meminfo") as lines:
            values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if "kB" in line}
        return values["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return 4 << 30


def _default_memory(device: str) -> int:
    memory = min(DEFAULT_MEMORY, free_memory() // 4)
    if device.startswith("cuda"):
        import torch

        memory = min(memory, torch.cuda.mem_get_info(device)[0] // 2)
    return max(memory, 128 << 20)


def _device(name: str) -> str:
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise RecipeError(f"there is no device '{name}'", hint="auto, cpu, cuda, cuda:N or mps")
    if kind == "cpu" or (kind == "auto" and not _may_have_gpu()):
        return "cpu"
    import torch

    if kind == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise RecipeError(f"torch finds no device '{name}'", hint="--device cpu, or install a CUDA build of torch")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("torch finds no device 'mps'", hint="--device cpu")
    return f"cuda:{index or 0}" if kind == "cuda" else kind


def _may_have_gpu() -> bool:
    """False where the system has no driver of a GPU that torch could use: asking torch takes a second."""
    return sys.platform != "linux" or any(True for driver in GPU_DRIVERS for _ in DEVICES.glob(driver))


@dataclass(frozen=True)
class MemoryCost:
    """The memory that evaluating a tensor takes in one worker.

    row: staged bytes for each row of a tile; fixed: bytes whatever the tile; live: blocks that
    exist at once.
    """

    row_nbytes: int = 0
    fixed_nbytes: int = 0
    scratch_blocks: int = 0

    def __add__(self, other: MemoryCost) -> MemoryCost:
        return MemoryCost(
            self.row_nbytes + other.row_nbytes,
            self.fixed_nbytes + other.fixed_nbytes,
            self.scratch_blocks + other.scratch_blocks,
        )


class Worker:
    """One thread's device, staging buffer, scratch blocks and, on CUDA, stream; all reused.

    On CUDA the staging buffer is pinned and has a twin on the device; what is read is copied there on
    the worker's own stream, and results come back into the staging buffer. With several workers
    one's disk time covers another's bus and compute time.

    `kernels`: what kernels.c can compute, it does, from the staged bytes (on a CPU).
    """

    def __init__(self, device: str, staging_nbytes: int) -> None:
        self.device = device
        self.kernels = device == "cpu" and bindings.available()
        self.write_behind = WriteBehind()
        self.stream: Any = None
        self._staging, self._on_device = self._buffers(staging_nbytes + ALIGNMENT)
        self._used = self._first = -self._staging.ctypes.data % ALIGNMENT
        self._kept: dict[Hashable, Any] = {}
        self._scratch: list[Tensor] = []
        self._slots = 0
        self.rereads = False  # whether what is read now is read again soon: the page cache keeps it

    def _buffers(self, nbytes: int) -> tuple[Bytes, Tensor | None]:
        """The staging buffer and, on a device, its twin there; the stream where there is one."""
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
        """Forget what was read: the staging buffer is free for the next tile."""
        self.wait()
        self._used = self._first
        self._kept.clear()
        self.reset_scratch()

    def reset_scratch(self) -> None:
        """Keep what was read, but let scratch blocks be handed out anew."""
        self._slots = 0

    def next_slot(self) -> int:
        """The number of a scratch block that nobody else has until the next restart()."""
        self._slots += 1
        return self._slots - 1

    def wait(self) -> None:
        """Wait until what was given to the device is done."""
        if self.stream is not None:
            self.stream.synchronize()

    def allocate(self, nbytes: int) -> Bytes:
        """`nbytes` of the staging buffer, until the next clear()."""
        piece = self._staging[self._used : self._used + nbytes]
        if len(piece) < nbytes:
            raise AssertionError(f"staging: {nbytes} bytes more than planned")  # the plan is wrong: a bug
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return piece

    def allocate_tensor(self, nbytes: int) -> tuple[Tensor, Tensor]:
        """`nbytes` of the staging buffer and of its twin on the device, which is the same on a CPU."""
        at = self._used
        self.allocate(nbytes)
        piece = self._on_host[at : at + nbytes]
        return piece, piece if self._on_device is None else self._on_device[at : at + nbytes]

    @cached_property
    def _on_host(self) -> Tensor:
        """The staging buffer as torch sees it."""
        import torch

        return torch.from_numpy(self._staging)

    def read(self, file: InputFile, offset: int, nbytes: int, *, keep: bool = False) -> Tensor:
        """Bytes of a file, on the device; read once, however often they are asked for until clear().

        `keep`: other tiles need them too, so the page cache keeps them.
        """

        def fetch() -> Tensor:
            piece, there = self.allocate_tensor(nbytes)
            file.read_into(piece.numpy().data, offset, keep=keep or self.rereads)
            return piece if there is piece else there.copy_(piece, non_blocking=True)

        return self.cached((file.path, offset, nbytes), fetch)

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` stages, made once, however often it is asked for until clear()."""
        if key not in self._kept:
            self._kept[key] = make()
        made: T = self._kept[key]
        return made

    def mark(self) -> tuple[int, int, int]:
        """Where the staging buffer and the scratch blocks stand, for release()."""
        return self._used, len(self._kept), self._slots

    def release(self, mark: tuple[int, int, int]) -> None:
        """Free what was staged and handed out since the mark."""
        self.wait()  # a copy to the device may still read the buffer
        self._used, kept, self._slots = mark
        while len(self._kept) > kept:
            self._kept.popitem()

    def scratch(self, slot: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The slot's reused temporary, in the given shape (one block); its old content is not kept."""
        import torch

        while len(self._scratch) <= slot:
            self._scratch.append(torch.empty(0, dtype=dtype, device=self.device))
        numel = shape[0] * shape[1]
        if self._scratch[slot].numel() < numel or self._scratch[slot].dtype != dtype:
            self._scratch[slot] = torch.empty(max(numel, BLOCK_ELEMENTS), dtype=dtype, device=self.device)
        return self._scratch[slot][:numel].view(shape)


@contextmanager
def one_torch_thread(needed: bool = True) -> Iterator[None]:
    """Let torch, if it is `needed`, compute with one thread here: more change last bits of sums, and tiles bring the
    parallelism."""
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


def steady_malloc() -> None:
    """Keep glibc from returning each freed block to the system: fresh pages are slow pages.

    By default blocks above 128 KB (a moving limit) are mapped and unmapped each time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def view_rows(raw: Tensor, dtype: str, columns: int) -> Tensor:
    """Raw bytes as rows of a tensor."""
    known = torch_dtype(dtype)
    assert known is not None, dtype
    return raw.view(known).view(-1, columns)
