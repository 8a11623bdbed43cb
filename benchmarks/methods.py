#!/usr/bin/env python3
"""Every merge method against mergekit: the same bf16 models, the same recipe, CPU, whole processes, results synced.

    python benchmarks/methods.py --dir DIR --peers VENV [--layers 8] [--rounds 1] [--only ties,della] [--cold]

VENV is a virtual environment with mergekit 0.1.5 (tools/peers makes it). The models are three fine-tunes of
one base in the 1.1B shape, cut to `--layers` of its 22 layers (8: 0.48 G parameters, some 20 minutes for all
methods; --layers 22 is the whole shape). Their weights are in the page cache before each run, or not (--cold).
Each figure is a whole process. Start-up takes the same
time for every method and weighs more the fewer layers there are; it is measured with a tiny model and subtracted in
the columns `without start-up`, which is what the ratio tends to as models grow. Ratios of CPU time vary less on
machines whose disk and cores are shared.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from measure import Measured, in_turn, machine, measure, median, mergeforge, prepare_cache, synced, table

from mergeforge.methods import METHODS
from mergeforge.operations.synthetic_models import model_shape, write_model

TRIMMING = ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce")
BARS = {True: 1 / 8, False: 1 / 4}  # of mergekit's time, by whether the method trims
PARAMETERS = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 1e-4},
    "sce": {"select_topk": 0.5},
    "passthrough": {"scale": 0.9},  # without a scale it is a copy
}
HEAD = [
    "method",
    "inputs",
    "mergekit s",
    "mergeforge s",
    "ratio",
    "bar",
    "without start-up",
    "CPU time without start-up",
]
HEAD += ["mergekit GB", "mergeforge GB"]
Runs = dict[str, list[Measured]]
NAMES = [name for name in METHODS if name != "fold"]  # task_arithmetic's other name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--threads", type=int, help="of both programs; theirs by OMP_NUM_THREADS")
    parser.add_argument("--cold", action="store_true", help="read the weights from the disk, not from the page cache")
    parser.add_argument("--only", default=",".join(NAMES))
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    weights = "from the disk" if given.cold else "cached"
    print(f"{machine()}; {given.layers} layers, {weights}; --memory {given.memory}\n", flush=True)
    start = _both(given, _recipe(given.dir, None, "linear"))
    rows = [_row(given, name, start) for name in given.only.split(",")]
    print(f"\n{table(HEAD, rows)}\n")
    theirs, ours = (median(start[one], lambda run: run.seconds) for one in ("theirs", "ours"))
    print(f"Start: mergekit {theirs:.1f} s, mergeforge {ours:.1f} s.")


def _row(given: argparse.Namespace, name: str, start: Runs) -> list[str]:
    found = _both(given, _recipe(given.dir, given.layers, name))
    inputs = "1" if name == "passthrough" else str(min(3, METHODS[name].inputs[1]))
    cells = _compared(found, start, BARS[name in TRIMMING])
    print(f"{name}: {', '.join(cells)}", flush=True)
    return [name, inputs, *cells]


def _both(given: argparse.Namespace, recipe: dict[str, Any]) -> Runs:
    """Run a recipe with both programs."""
    options = ["--memory", given.memory, *(["--threads", str(given.threads)] if given.threads else [])]
    cases = {
        "ours": lambda: mergeforge(recipe, given.dir / "out", *options),
        "theirs": lambda: _mergekit(given.dir, given.peers, given.threads, recipe),
    }
    folders = [Path(one["model"]) for one in recipe["models"]] + [Path(recipe.get("base_model", "."))]
    found = in_turn(given.rounds, cases, before=lambda: prepare_cache(folders, cached=not given.cold))
    for folder in ("out", "peer-out"):
        shutil.rmtree(given.dir / folder)
    return found


def _compared(found: Runs, start: Runs, bar: float) -> list[str]:
    theirs, ours = (median(found[one], lambda run: run.seconds) for one in ("theirs", "ours"))
    before = [median(start[one], lambda run: run.seconds) for one in ("theirs", "ours")]
    rest = (ours - before[1]) / max(theirs - before[0], 0.1)
    work = [median(found[one], _cpu) - median(start[one], _cpu) for one in ("theirs", "ours")]
    peaks = [median(found[one], lambda run: run.peak) / 1e9 for one in ("theirs", "ours")]
    shares = [f"{share:.3f}" for share in (ours / theirs, bar, rest, work[1] / max(work[0], 0.1))]
    return [f"{theirs:.1f}", f"{ours:.1f}", *shares, *(f"{peak:.2f}" for peak in peaks)]


def _cpu(run: Measured) -> float:
    return run.cpu


def _recipe(root: Path, layers: int | None, name: str) -> dict[str, Any]:
    """Three fine-tunes, or as many as the method takes, and their base where it needs one."""
    method = METHODS[name]
    count = min(3, method.inputs[1]) - method.base_is_input
    each = {key: 0.5 for key in ("weight", "density") if key in method.parameters}
    models = [{"model": str(_model(root, layers, seed)), "parameters": each} for seed in range(1, count + 1)]
    recipe: dict[str, Any] = {"merge_method": name, "models": models, "dtype": "bfloat16"}
    if method.needs_base:
        recipe["base_model"] = str(_model(root, layers, 0))
    return recipe | ({"parameters": PARAMETERS[name]} if name in PARAMETERS else {})


def _model(root: Path, layers: int | None, seed: int) -> Path:
    """The base (seed 0) or a fine-tune of it, made once; without a number of layers, a tiny one."""
    folder = root / f"{f'1.1b-{layers}-layers' if layers else 'tiny'}-{seed}"
    if not (folder / "config.json").exists():
        shape = replace(model_shape("1.1b"), layers=layers) if layers else model_shape("tiny")
        write_model(folder, shape, seed=seed, near=0 if seed else None)
    return folder


def _mergekit(root: Path, peers: Path, threads: int | None, recipe: dict[str, object]) -> Measured:
    out, path = root / "peer-out", root / "peer.yaml"
    shutil.rmtree(out, ignore_errors=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [str(peers / "bin" / "mergekit-yaml"), str(path), str(out), "--quiet"]
    return measure(synced(["env", f"OMP_NUM_THREADS={threads}", *command] if threads else command, out))


if __name__ == "__main__":
    main()
