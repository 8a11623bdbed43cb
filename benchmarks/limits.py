#!/usr/bin/env python3
"""Merges against the limit that their bytes set: reading the cached inputs once and copying the output to the disk.

    python benchmarks/limits.py --dir DIR [--layers 8] [--rounds 5] [--other CHECKOUT]

Three fine-tunes of a base in the 1.1B shape, cut to `--layers` of its 22 layers, in the page cache before each run.
The limit is the time to read all inputs in two threads, plus that of raw_copy.py for a file of the output's size. A
merge is a whole process minus the start of one with a tiny model. `--other` runs the same merges with the code of
another checkout in turn. Medians of the rounds; everything is measured in one run, and results are synced.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import raw_copy
import yaml
from measure import PYTHON, machine, measure, prepare_cache, table

from mergeforge.operations.synthetic_models import model_shape, write_model

CHUNK = 8 << 20
CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {  # name -> method, models, whether it has a base, parameters
    "linear of three": ("linear", 3, False, {"weight": 0.3}),
    "task_arithmetic of two and a base": ("task_arithmetic", 2, True, {"weight": 0.5}),
    "ties of two and a base": ("ties", 2, True, {"weight": 0.5, "density": 0.5}),
    "dare_ties of two and a base": ("dare_ties", 2, True, {"weight": 0.5, "density": 0.5}),
    "sce of two and a base": ("sce", 2, True, {"select_topk": 0.5}),
    "della of two and a base": ("della", 2, True, {"weight": 0.5, "density": 0.5}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other", type=Path, help="another checkout, with its C library compiled")
    parser.add_argument("--only", default=",".join(CASES))
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    shapes = {"tiny": model_shape("tiny"), "large": replace(model_shape("1.1b"), layers=options.layers)}
    for name, shape in shapes.items():
        for seed in range(4):
            if not (folder := options.dir / f"{name}-{seed}" / "config.json").exists():
                write_model(folder.parent, shape, seed=seed, near=0 if seed else None)
    print(f"{machine()}; {options.layers} layers, cached, --memory 256MiB, {options.rounds} rounds\n", flush=True)
    checkouts = {"": None} | ({"other ": options.other} if options.other else {})
    head = [
        "merge",
        "limit s",
        *(f"{name}merge s" for name in checkouts),
        *(f"{name}merge / limit" for name in checkouts),
    ]
    rows = [row(options, case, checkouts) for case in options.only.split(",")]
    print(f"\n{table(head, rows)}")


def row(options: argparse.Namespace, case: str, checkouts: dict[str, Path | None]) -> list[str]:
    """One case: the limit, the merges, the ratios."""
    runs: dict[str, Callable[[], float]] = {"limit": lambda: limit(options.dir, case)}
    for name, checkout in checkouts.items():
        runs |= {f"{name}{size}": merge_of(options.dir, case, size, checkout) for size in ("tiny", "large")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            prepare_cache(inputs(options.dir, case, "large"), cached=True)
            seconds[name].append(run())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    merges = [medians[f"{name}large"] - medians[f"{name}tiny"] for name in checkouts]
    ratios = [f"{merge / medians['limit']:.2f}" for merge in merges]
    cells = [case, f"{medians['limit']:.2f}", *(f"{merge:.2f}" for merge in merges), *ratios]
    print(", ".join(cells), flush=True)
    return cells


def inputs(root: Path, case: str, size: str) -> list[Path]:
    """The models of a case, and the base."""
    _, count, has_base, _ = CASES[case]
    return [root / f"{size}-{seed}" for seed in [*range(1, count + 1), *([0] if has_base else [])]]


def merge_of(root: Path, case: str, size: str, checkout: Path | None) -> Callable[[], float]:
    method, count, has_base, parameters = CASES[case]
    folders = inputs(root, case, size)
    per_model = {name: value for name, value in parameters.items() if name in ("weight", "density")}
    models = [{"model": str(folder), "parameters": per_model} for folder in folders[:count]]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    recipe |= {"parameters": {name: value for name, value in parameters.items() if name not in per_model}}
    recipe |= {"base_model": str(folders[-1])} if has_base else {}
    path, out = root / "limits.yaml", root / "out"
    environment = ["env", f"PYTHONPATH={checkout}"] if checkout else []
    command = [*environment, PYTHON, "-m", "mergeforge", "run", str(path), "--out", str(out), "--device", "cpu"]

    def run() -> float:
        shutil.rmtree(out, ignore_errors=True)
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return measure([*command, "--memory", "256MiB"]).seconds

    return run


def limit(root: Path, case: str) -> float:
    """Seconds to read all inputs from the page cache, and to copy one of them to the disk."""
    folders = inputs(root, case, "large")
    started = time.perf_counter()
    paths = [path for folder in folders for path in folder.glob("*.safetensors")]
    jobs = [(path, at) for path in paths for at in range(0, path.stat().st_size, CHUNK)]
    readers = [threading.Thread(target=_read, args=(jobs[number::2],)) for number in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    seconds = time.perf_counter() - started
    shutil.rmtree(root / "copy", ignore_errors=True)
    return seconds + raw_copy.copy(folders[0], root / "copy")


def _read(jobs: list[tuple[Path, int]]) -> None:
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    files: dict[Path, int] = {}
    for path, at in jobs:
        file = files.setdefault(path, -1)
        if file < 0:
            file = files[path] = os.open(path, os.O_RDONLY)
        os.preadv(file, [buffer], at)
    for file in files.values():
        os.close(file)


if __name__ == "__main__":
    main()
