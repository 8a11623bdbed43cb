"""Doctor: what this machine and this installation can do, for a bug report. No token, no name of a user."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mergeforge.core.sizes import format_size
from mergeforge.gguf.quantize import backend
from mergeforge.io.disk import WriteBehind, preallocate, write_at
from mergeforge.native import bindings
from mergeforge.tensors.budget import cpu_count, free_memory

PACKAGES = ("mergeforge", "torch", "safetensors", "numpy", "huggingface_hub", "gguf", "click", "rich", "pyyaml")
EXTRAS = {
    "fast": ("numba",),
    "engine": ("xllamacpp",),
    "remote": ("fsspec",),
    "train": ("transformers", "peft", "accelerate", "bitsandbytes"),
    "data": ("pyarrow",),
    "metrics": ("sacrebleu", "rouge-score"),
    "track": ("tensorboard",),
    "eval": ("lm-eval",),
}
PIECE = 8 << 20  # bytes written at a time
SECONDS = 5.0


def report(folder: str | Path = ".", *, seconds: float = SECONDS) -> Iterator[tuple[str, str]]:
    """(what, how it is) line by line; the disk of `folder` is measured for at most `seconds`."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    for extra, names in EXTRAS.items():
        yield f"[{extra}]", ", ".join(f"{name} {_version(name)}" for name in names)
    yield "processors", str(cpu_count())
    yield "memory", f"{format_size(free_memory())} available"
    yield from _devices()
    yield (
        "merging",
        "kernels in C"
        if bindings.is_available()
        else "torch: kernels.c is not compiled, or another one was; install mergeforge again where a C compiler is",
    )
    yield "quantising", backend("cpu")
    yield from _disk(Path(folder), seconds)
    yield from _hub()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    for at in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(at)
        yield f"cuda:{at}", f"{torch.cuda.get_device_name(at)}, {format_size(free)} of {format_size(whole)} free"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    if not torch.cuda.is_available():
        yield "cuda", f"torch {torch.__version__} finds none"


def _disk(folder: Path, seconds: float) -> Iterator[tuple[str, str]]:
    free = shutil.disk_usage(folder).free
    yield "disk", f"{format_size(free)} free, written at {_written(folder, min(free // 4, 4 << 30), seconds)}"


def _written(folder: Path, most: int, seconds: float) -> str:
    """How fast a file is written and synced here, as a merge writes."""
    path, done = folder / f".mergeforge-doctor-{os.getpid()}", 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        preallocate(fd, most, str(path))
        behind, piece = WriteBehind(), memoryview(os.urandom(1 << 20) * (PIECE >> 20))
        started = time.monotonic()
        while done + PIECE <= most and time.monotonic() - started < seconds:
            write_at(fd, piece, done, str(path))
            behind.written(fd, done, PIECE)
            done += PIECE
        os.fsync(fd)
        return f"{format_size(round(done / (time.monotonic() - started)))}/s"
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _hub() -> Iterator[tuple[str, str]]:
    from huggingface_hub import constants, get_token

    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    yield "hub", f"{constants.ENDPOINT}{offline}, {'a token is there' if get_token() else 'no token'}"
