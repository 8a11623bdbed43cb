#!/usr/bin/env python3
"""Every kind of adapter: how exactly it folds, and what folding it costs beside plain LoRA, as a Markdown table.

    python benchmarks/adapters.py [--only loha,oft] [--no-time]

`d PEFT` is the largest difference to PEFT's own float32 merge on a tiny model, relative to the tensor's largest weight;
`d logits` that of the merged model's logits to the unmerged model's. `time` is processor time of the whole merge
on one thread, over that of a LoRA of rank 16 on the same modules, for two layers in the width of a 1.1B model;
the model is bfloat16, the median of three.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.extend([str(Path(__file__).parents[1] / "tests" / name) for name in ("", "adapters/peft/kinds")])

from measure import machine, table
from safetensors.torch import load_file
from support.peft_lab import Lab
from test_kinds_against_peft import ALL, BIASES, CASES

import mergeforge
from mergeforge.operations.synthetic_models import ModelShape, write_model

HEAD = ["kind", "configuration", "d PEFT", "d logits", "time, LoRA = 1"]
WIDE = ModelShape(hidden=2048, intermediate=5632, layers=2, heads=32, kv_heads=4, vocab=1000)
ROUNDS = 3
Case = tuple[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--no-time", action="store_true")
    given = parser.parse_args()
    chosen = {name: case for name, case in (CASES | BIASES).items() if not given.only or name in given.only.split(",")}
    with tempfile.TemporaryDirectory() as place:
        lab = Lab(Path(place))
        write_model(Path(place) / "wide", WIDE, seed=0)
        lora = 0.0 if given.no_time else _seconds(lab, ("LoraConfig", {"r": 16}))
        rows = []
        for name, case in chosen.items():
            exact, logits = _errors(lab, "qwen2" if name in BIASES else "llama", case)
            untimed = given.no_time or name in BIASES  # the wide model has none
            cost = "" if untimed else f"{_seconds(lab, case) / lora:.2f}"
            rows.append([name, _told(case[1]), f"{exact:.1e}", f"{logits:.1e}", cost])
            print(f"{name}: {rows[-1][2:]}", file=sys.stderr, flush=True)
    print(f"{machine()}\n\n{table(HEAD, rows)}")
    if lora:
        print(f"\nLoRA of rank 16: {lora:.2f} s of processor time.")


def _told(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items() if key != "target_modules")


def _errors(lab: Lab, kind: str, case: Case) -> tuple[float, float]:
    name, config = case
    base = lab.base(kind)
    adapter = lab.tune(base, name, {"target_modules": ALL} | config)
    out = mergeforge.merge(base_model=str(base), adapters=[str(adapter.folder)], out=lab.out())
    ours, theirs = load_file(out / "model.safetensors"), adapter.merged_by_peft()
    others = {key: theirs[key if key in theirs else f"model.{key}"] for key in ours}
    worst = max(float((value - others[key]).abs().max() / others[key].abs().max()) for key, value in ours.items())
    with lab.quiet():
        wanted, merged = lab.logits(adapter.model), lab.logits(lab.load(out))
    return worst, float((merged - wanted).abs().max() / wanted.abs().max())


def _seconds(lab: Lab, case: Case) -> float:
    """Processor time of a merge into the wide model."""
    name, config = case
    base = lab.folder / "wide"
    try:
        adapter = lab.tune(base, name, {"target_modules": ALL} | config)
    except (RuntimeError, ValueError):
        return float("nan")  # a configuration made for the tiny model's shapes
    found = []
    for _ in range(ROUNDS):
        before = _processor()
        mergeforge.merge(base_model=str(base), adapters=[str(adapter.folder)], out=lab.out(), threads=1)
        found.append(_processor() - before)
    return statistics.median(found)


def _processor() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"({time.monotonic() - started:.0f} s)", file=sys.stderr)
