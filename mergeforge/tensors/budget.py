"""Budget: the memory, device and threads that a merge may use.

The memory is divided evenly among the workers. A worker's share holds its staging buffer (raw bytes of one tile of
every input and of the output) and the block-sized float32 temporaries of its computation. The plan proves from the
shapes that every tile fits; nothing is measured or guessed at run time.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mergeforge.core.sizes import parse_size
from mergeforge.errors import BudgetError, RecipeError

DEVICES = Path("/dev")
GPU_DRIVERS = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd")  # device files: NVIDIA, Tegra (two), WSL, AMD
MAX_THREADS = 8  # more threads only compete for the disk
DEFAULT_MEMORY = 2 << 30
MIN_MEMORY = 16 << 20
STREAMING_THREADS = 8  # with remote inputs: up to this many workers, as long as each gets STREAMING_SHARE
STREAMING_SHARE = 32 << 20
MAX_REMOTE_CACHE = 64 << 20


@dataclass(frozen=True)
class Budget:
    """Working memory in bytes, torch device name, number of workers (0: as many as fit).

    `remote_cache`: the part of the memory reserved for caching ranges of remote inputs; 0 if all inputs are local.
    `is_default`: whether the user left the memory to mergeforge.
    """

    memory: int
    device: str
    threads: int = 0
    remote_cache: int = 0
    is_default: bool = False

    @property
    def per_worker(self) -> int:
        return (self.memory - self.remote_cache) // max(self.threads, 1)

    @property
    def max_threads(self) -> int:
        """The largest useful number of workers: one per CPU core, more where they wait for the network."""
        streaming = min(STREAMING_THREADS, self.memory // STREAMING_SHARE) if self.remote_cache else 0
        return min(max(cpu_count(), streaming), MAX_THREADS)

    @property
    def buffer_copies(self) -> int:
        """How many copies of the staged bytes exist: one on the host, and one on the device if there is one."""
        return 1 if self.device == "cpu" else 2


@dataclass(frozen=True)
class MemoryCost:
    """The memory that evaluating a tensor takes in one worker.

    row_nbytes: staged bytes per row of a tile; fixed_nbytes: bytes independent of the tile; scratch_blocks:
    block-sized temporaries that exist at the same time.
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


def make_budget(memory: str | int | None = None, device: str = "auto", threads: int | None = None) -> Budget:
    """Parse the user's options; `auto` chooses CUDA if available.

    Raises RecipeError for an invalid size, device or count, and BudgetError for less memory than any merge needs.
    """
    try:
        nbytes = parse_size(memory) if memory is not None else None
    except ValueError as error:
        raise RecipeError(f"memory: {error}") from None
    if nbytes is not None and nbytes < MIN_MEMORY:
        raise BudgetError(f"{memory} of memory is too little for any merge", hint="give at least 16MiB")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise RecipeError(f"threads must be a whole number of at least 1, not {threads!r}")
    device = _device(device)
    return Budget(nbytes or _default_memory(device), device, threads or 0, is_default=memory is None)


def cpu_count() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_memory() -> int:
    """This process's resident memory in bytes (its peak on systems without /proc)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int:
    """Bytes available without swapping; 4 GiB is assumed on systems without /proc/meminfo."""
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
        raise RecipeError(f"unknown device '{name}'", hint="use auto, cpu, cuda, cuda:N or mps")
    if kind == "cpu" or (kind == "auto" and not _may_have_gpu()):
        return "cpu"
    import torch

    if kind == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        hint = "use --device cpu, or install a CUDA build of torch"
        raise RecipeError(f"torch finds no device '{name}'", hint=hint)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("torch finds no device 'mps'", hint="use --device cpu")
    return f"cuda:{index or 0}" if kind == "cuda" else kind


def _may_have_gpu() -> bool:
    """False if the system has no driver for a GPU that torch could use; asking torch takes a second."""
    return sys.platform != "linux" or any(True for driver in GPU_DRIVERS for _ in DEVICES.glob(driver))
