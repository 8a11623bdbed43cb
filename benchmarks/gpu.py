#!/usr/bin/env python3
"""Merging on a CUDA GPU with its memory capped to 8 GB: speed, memory, and agreement with the CPU.

    python benchmarks/gpu.py [--dir DIR] [--cap 8] [--quick]

Needs only the core packages and about 55 GB of disk; makes its inputs. The table comes last. The
cap is torch.cuda.set_per_process_memory_fraction, so a merge that needed more would fail.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import adapter, machine, model, table
from raw_copy import copy

import mergeforge
from mergeforge.io import disk, file_layout
from mergeforge.operations import inspect
from mergeforge.tensors import budget

# What CPU and GPU results may differ by: float32 sums in another order, rounded to bfloat16.
ALLOWED_RELATIVE = 1e-4
MEMORY = "4GiB"
GGUF_TYPES = ("q8_0", "q4_0", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "mergeforge-gpu")
    parser.add_argument("--cap", type=float, default=8, help="device memory in GB")
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="1.1B instead of 7B and 13B")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap * 1e9 / total))
    given.dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for shape, name in _cases(given.quick):
        rows.append(_row(given.dir, shape, name, given.threads))
        print(rows[-1], flush=True)
    agreement = _agreement(given.dir)
    encoded = _gguf_agreement(given.dir)
    print(f"\n{machine()}; {torch.cuda.get_device_name(0)}, capped to {given.cap:g} GB; --memory {MEMORY}\n")
    head = [
        "merge",
        "shape",
        "written",
        "raw copy s",
        "GPU s",
        "GPU / raw",
        "GB/s",
        "1 worker s",
        "overlap",
        "peak VRAM",
        "peak RSS",
    ]
    print(table(head, rows))
    print()
    print(table(["merge", "tensors", "not the same", "largest relative difference", "allowed"], agreement))
    print()
    print(table(["GGUF of the same values", "bytes", "bytes that differ"], encoded))


def _cases(quick: bool) -> Iterator[tuple[str, str]]:
    large = ("1.1b",) if quick else ("7b", "13b")
    for shape in large:
        yield shape, "fold"
        yield shape, "q4_k_m"
        if shape != "13b":
            yield shape, "ties"


def _row(root: Path, shape: str, name: str, threads: int) -> list[str]:
    for other in root.glob("*"):
        if other.is_dir() and not other.name.startswith(shape):
            shutil.rmtree(other)  # only one shape's inputs are on the disk at a time
    recipe = _recipe(root, shape, name)
    out = root / f"{shape}-out"
    raw = copy(model(root, shape), out, threads)
    shutil.rmtree(out)
    torch.cuda.reset_peak_memory_stats()
    with _stages() as stages:
        many = _seconds(recipe, out, threads, "cuda")
    alone = _seconds(recipe, out, 1, "cuda")
    vram = torch.cuda.max_memory_allocated()
    written = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".gguf"))
    shutil.rmtree(out)
    return [
        name,
        shape,
        f"{written / 1e9:.1f} GB",
        f"{raw:.1f}",
        f"{many:.1f}",
        f"{many / raw:.2f}",
        f"{written / many / 1e9:.2f}",
        f"{alone:.1f}",
        _overlap(stages, many),
        f"{vram / 2**20:.0f} MiB",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB",
    ]


def _overlap(stages: Counter[str], elapsed: float) -> str:
    """How many seconds of work were done in each second."""
    parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items())
    return f"{sum(stages.values()) / elapsed:.1f} ({parts} s)"


@contextmanager
def _stages() -> Iterator[Counter[str]]:
    """Seconds that all workers together spend reading, writing, and waiting for bus and compute."""
    found: Counter[str] = Counter()
    lock = threading.Lock()
    places = {
        "read": (disk.DiskFile, "read_into"),
        "write": (file_layout.OutputFiles, "write"),
        "compute": (budget.Worker, "wait"),
    }
    originals = {stage: getattr(*place) for stage, place in places.items()}

    def timed(stage: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return originals[stage](*args, **kwargs)
            finally:
                with lock:
                    found[stage] += time.perf_counter() - started

        return call

    for stage, (owner, name) in places.items():
        setattr(owner, name, timed(stage))
    try:
        yield found
    finally:
        for stage, (owner, name) in places.items():
            setattr(owner, name, originals[stage])


def _recipe(root: Path, shape: str, name: str) -> dict[str, Any]:
    base = str(model(root, shape))
    folded = {"base_model": base, "adapters": [str(adapter(root, shape))]}
    if name == "fold":
        return folded
    if name in GGUF_TYPES:
        return folded | {"output": {"safetensors": False, "gguf": [name], "gguf_pre": "gpt-2"}}
    tuned = [str(model(root, shape, seed=seed, near=0)) for seed in (1, 2)]
    models = [{"model": one, "parameters": {"weight": 1.0, "density": 0.5}} for one in tuned]
    return {"merge_method": name, "base_model": base, "models": models}


def _seconds(recipe: dict[str, Any], out: Path, threads: int, device: str) -> float:
    plan = mergeforge.plan(recipe, out=out, memory=MEMORY, device=device, threads=threads)
    started = time.perf_counter()
    for _ in mergeforge.iter_run(plan, overwrite=True):
        pass
    return time.perf_counter() - started


def _agreement(root: Path) -> list[list[str]]:
    """CPU and GPU results of the same merges, tensor by tensor."""
    rows = []
    for name in ("fold", "linear", "slerp", "ties", "dare_ties"):
        shape = "1.1b"
        recipe = _recipe(root, shape, "ties" if name != "fold" else "fold") | {"merge_method": name}
        if name in ("linear", "slerp"):
            recipe["models"] = [{"model": one["model"]} for one in recipe["models"][: 1 if name == "slerp" else 2]]
            recipe["parameters"] = {"t": 0.4} if name == "slerp" else {"weight": 0.5}
        for device in ("cpu", "cuda"):
            _seconds(recipe, root / f"{shape}-{device}-out", 4, device)
        pair = [str(root / f"{shape}-{device}-out") for device in ("cpu", "cuda")]
        found = list(inspect.differences(*pair))
        largest = max(one.relative for one in found)
        verdict = f"{ALLOWED_RELATIVE:g}" + ("" if largest <= ALLOWED_RELATIVE else " EXCEEDED")
        rows.append([name, str(len(found)), str(sum(not one.same for one in found)), f"{largest:.2g}", verdict])
    return rows


def _gguf_agreement(root: Path) -> list[list[str]]:
    """GGUF files that the CPU and the GPU encode from the same stored values, byte by byte."""
    import numpy as np

    output = {"safetensors": False, "gguf": list(GGUF_TYPES), "gguf_pre": "gpt-2", "name": "m"}
    recipe = {"merge_method": "passthrough", "models": [str(model(root, "1.1b"))], "output": output}
    for device in ("cpu", "cuda"):
        _seconds(recipe, root / f"1.1b-{device}-out", 4, device)
    rows = []
    for path in sorted((root / "1.1b-cpu-out").glob("*.gguf")):
        one, two = (np.memmap(root / f"1.1b-{device}-out" / path.name, np.uint8, "r") for device in ("cpu", "cuda"))
        rows.append([path.name, str(len(one)), str(int((one != two).sum()))])
    return rows


if __name__ == "__main__":
    main()
