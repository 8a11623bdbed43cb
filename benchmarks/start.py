#!/usr/bin/env python3
"""How soon commands answer: --help, a recipe error, and the plan of a 70B (sparse files).

python benchmarks/start.py --dir DIR
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from pathlib import Path

from measure import PYTHON, machine, table

from mergeforge.operations.synthetic_models import model_shape, write_adapter
from mergeforge.writers.safetensors import INDEX, index_content, lay_out


def sparse_model(folder: Path, shape_name: str) -> Path:
    """Sparse files with headers of the real sizes."""
    shape = model_shape(shape_name)
    tensors = shape.tensors()
    layout = lay_out(tensors, 5 * 10**9)
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in layout.files.items():
        with open(folder / name, "wb") as stream:
            stream.write(file.header)
            stream.truncate(file.nbytes)
    (folder / INDEX).write_bytes(index_content(layout, tensors) or b"{}")
    return folder


def seconds(*command: str) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([PYTHON, "-m", "mergeforge", *command], capture_output=True, check=False)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    root = parser.parse_args().dir
    base = sparse_model(root / "70b-sparse", "70b")
    write_adapter(root / "70b-adapter", model_shape("70b"), str(base), rank=8, dtype="BF16")
    bad, good = root / "bad.yaml", root / "70b.yaml"
    bad.write_text("merge_methd: ties\nmodels: [a]\n", encoding="utf-8")
    good.write_text(f"base_model: {base}\nadapters: [{root / '70b-adapter'}]\n", encoding="utf-8")
    rows = [
        ["mergeforge --help", f"{seconds('--help'):.2f} s", "0.5 s"],
        ["a recipe error", f"{seconds('run', str(bad), '--out', str(root / 'out')):.2f} s", "0.5 s"],
        ["mergeforge list methods", f"{seconds('list', 'methods'):.2f} s", "0.5 s"],
        ["plan of a 70B with an adapter", f"{seconds('plan', str(good), '--out', str(root / 'out')):.2f} s", "5 s"],
    ]
    print(f"{machine()}; median of 5\n\n{table(['command', 'answers in', 'bar'], rows)}")


if __name__ == "__main__":
    main()
