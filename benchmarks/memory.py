#!/usr/bin/env python3
"""Peak resident memory of whole merges against the memory they were given.

    python benchmarks/memory.py --dir DIR [--cases fold-7b,ties-1.1b,...]

Needs up to 55 GB of disk for all cases; inputs are made in DIR once.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from measure import Measured, adapter, machine, mergeforge, model, table

from mergeforge.operations.synthetic_models import SHAPES, ModelShape

SHAPES["embedding"] = ModelShape(4096, 1024, 1, 32, 8, 128256)  # the embedding of an 8B model and little else
INTERPRETER = 350  # MiB allowed for Python and torch on top of --memory


def fold(root: Path, shape: str, memory: str) -> Measured:
    recipe = {"base_model": str(model(root, shape)), "adapters": [str(adapter(root, shape))]}
    return mergeforge(recipe, root / "out", "--memory", memory)


def ties(root: Path, shape: str, count: int, memory: str) -> Measured:
    tuned = [model(root, shape, seed=seed, near=0) for seed in range(1, count + 1)]
    recipe = {
        "merge_method": "ties",
        "base_model": str(model(root, shape)),
        "models": [{"model": str(one), "parameters": {"weight": 1.0, "density": 0.5}} for one in tuned],
    }
    return mergeforge(recipe, root / "out", "--memory", memory)


CASES: dict[str, tuple[str, str, Callable[[Path, str], Measured]]] = {
    "fold-1.1b": ("fold, 1.1B", "256MiB", lambda root, memory: fold(root, "1.1b", memory)),
    "fold-7b": ("fold, 7B", "256MiB", lambda root, memory: fold(root, "7b", memory)),
    "fold-13b": ("fold, 13B", "256MiB", lambda root, memory: fold(root, "13b", memory)),
    "ties-1.1b": ("ties of three 1.1B", "256MiB", lambda root, memory: ties(root, "1.1b", 3, memory)),
    "embedding": ("ties of four, 128256 x 4096", "256MiB", lambda root, memory: ties(root, "embedding", 4, memory)),
    "fold-64": ("fold, 1.1B", "64MiB", lambda root, memory: fold(root, "1.1b", memory)),
    "ties-64": ("ties of three 1.1B", "64MiB", lambda root, memory: ties(root, "1.1b", 3, memory)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}\n")
    rows = []
    for name in given.cases.split(","):
        about, memory, case = CASES[name]
        try:
            found = case(given.dir, memory)
        except subprocess.CalledProcessError as error:
            rows.append([about, memory, "refused", error.output.strip().splitlines()[0], ""])
            continue
        bar = int(memory.removesuffix("MiB")) + INTERPRETER
        rows.append([about, memory, f"{found.peak / 2**20:.0f} MiB", f"{bar} MiB", f"{found.seconds:.0f} s"])
        shutil.rmtree(given.dir / "out")
    print(table(["merge", "--memory", "peak RSS", "bar", "time"], rows))


if __name__ == "__main__":
    main()
