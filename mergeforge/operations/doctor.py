"""What this machine and this installation can do, for bug reports. Contains no token and no user name."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mergeforge.core.sizes import format_size
from mergeforge.io.disk import WriteBehind, preallocate, write_at
from mergeforge.native import bindings
from mergeforge.tensors.budget import cpu_count, free_memory

PACKAGES = ("mergeforge", "torch", "safetensors", "numpy", "huggingface_hub", "gguf", "click", "rich", "pyyaml")
OPTIONAL = {
    "llama.cpp": ("xllamacpp",),
    "remote inputs": ("fsspec",),
    "training": ("transformers", "peft", "accelerate", "bitsandbytes"),
    "parquet": ("pyarrow",),
    "text metrics": ("sacrebleu", "rouge-score"),
    "tracking": ("tensorboard",),
    "lm-eval": ("lm-eval",),
}
WRITE_NBYTES = 8 << 20  # bytes written at a time
SECONDS = 5.0


def report(folder: str | Path = ".", *, seconds: float = SECONDS) -> Iterator[tuple[str, str]]:
    """(name, value) pairs; measures the disk of `folder` for at most `seconds`."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    for purpose, names in OPTIONAL.items():
        yield purpose, ", ".join(f"{name} {_version(name)}" for name in names)
    yield "cores", str(cpu_count())
    yield "memory", f"{format_size(free_memory())} available"
    yield from _devices()
    unused = f"not in use, so torch merges and quantizes, more slowly: it {bindings.why_unavailable()}"
    yield "C library", "merges and quantizes" if bindings.is_available() else unused
    yield from _disk(Path(folder), seconds)
    yield from _hub()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {format_size(free)} of {format_size(total)} free"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    if not torch.cuda.is_available():
        yield "cuda", f"torch {torch.__version__} finds no GPU"


def _disk(folder: Path, seconds: float) -> Iterator[tuple[str, str]]:
    free = shutil.disk_usage(folder).free
    yield "disk", f"{format_size(free)} free, written at {_write_speed(folder, min(free // 4, 4 << 30), seconds)}"


def _write_speed(folder: Path, max_nbytes: int, seconds: float) -> str:
    """The speed at which a file is written and synced here, as a merge writes it."""
    path, done = folder / f".mergeforge-doctor-{os.getpid()}", 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        preallocate(fd, max_nbytes, str(path))
        behind, piece = WriteBehind(), memoryview(os.urandom(1 << 20) * (WRITE_NBYTES >> 20))
        started = time.monotonic()
        while done + WRITE_NBYTES <= max_nbytes and time.monotonic() - started < seconds:
            write_at(fd, piece, done, str(path))
            behind.written(fd, done, WRITE_NBYTES)
            done += WRITE_NBYTES
        os.fsync(fd)
        return f"{format_size(round(done / (time.monotonic() - started)))}/s"
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _hub() -> Iterator[tuple[str, str]]:
    from huggingface_hub import constants, get_token

    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    yield "hub", f"{constants.ENDPOINT}{offline}, {'logged in' if get_token() else 'no token'}"
