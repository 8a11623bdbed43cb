#!/usr/bin/env python3
"""mergeforge against mergekit and PEFT: same inputs, same run, CPU, whole processes, inputs cached, results synced.

    python benchmarks/peers.py --dir DIR --peers VENV [--rounds 1] [--shape 1.1b]

VENV is a virtual environment with mergekit 0.1.5 and peft (tools/peers makes it).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from measure import (
    Measured,
    adapter,
    in_turn,
    machine,
    measure,
    median,
    mergeforge,
    model,
    prepare_cache,
    synced,
    table,
)

MEMORY = "256MiB"  # 256 MiB + the interpreter stays within 0.6 GB
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--shape", default="1.1b")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="linear,slerp,ties,fold")
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; --memory {MEMORY}\n")
    rows = [_row(given, name) for name in given.only.split(",")]
    print(table(["merge", "peer", "peer s", "mergeforge s", "times faster", "peer GB", "mergeforge GB"], rows))


def _row(given: argparse.Namespace, name: str) -> list[str]:
    recipe = _recipe(given.dir, given.shape, name)
    peer: Callable[[], Measured]
    if name == "fold":
        label, peer = "PEFT", lambda: _peft(given.dir, given.peers, given.shape)
    else:
        label, peer = "mergekit", lambda: _mergekit(given.dir, given.peers, recipe)
    cases = {"ours": lambda: mergeforge(recipe, given.dir / "out", "--memory", MEMORY), "peer": peer}
    found = in_turn(given.rounds, cases, before=lambda: prepare_cache(_inputs(recipe), cached=True))
    shutil.rmtree(given.dir / "out")
    shutil.rmtree(given.dir / "peer-out")
    ours, theirs = (median(found[one], lambda run: run.seconds) for one in ("ours", "peer"))
    peaks = [median(found[one], lambda run: run.peak) / 1e9 for one in ("peer", "ours")]
    return [name, label, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}", f"{peaks[0]:.2f}", f"{peaks[1]:.2f}"]


def _recipe(root: Path, shape: str, name: str) -> dict[str, object]:
    base = str(model(root, shape))
    if name == "fold":
        return {"base_model": base, "adapters": [str(adapter(root, shape))]}
    first, second = (str(model(root, shape, seed=seed, near=0)) for seed in (1, 2))
    if name == "slerp":
        models: list[object] = [{"model": first}]
        return {
            "merge_method": name,
            "base_model": base,
            "models": models,
            "parameters": {"t": 0.4},
            "dtype": "bfloat16",
        }
    parameters = {"weight": 0.5} | ({"density": 0.5} if name == "ties" else {})
    models = [{"model": one, "parameters": parameters} for one in (first, second)]
    recipe: dict[str, object] = {"merge_method": name, "models": models, "dtype": "bfloat16"}
    return recipe | ({"base_model": base} if name == "ties" else {})


def _inputs(recipe: dict[str, Any]) -> list[Path]:
    folders = [recipe.get("base_model"), *(one["model"] for one in recipe.get("models", ()))]
    return [Path(one) for one in folders if one]


def _mergekit(root: Path, peers: Path, recipe: dict[str, object]) -> Measured:
    out = root / "peer-out"
    shutil.rmtree(out, ignore_errors=True)
    path = root / "peer.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return measure(synced([str(peers / "bin" / "mergekit-yaml"), str(path), str(out), "--quiet"], out))


def _peft(root: Path, peers: Path, shape: str) -> Measured:
    out = root / "peer-out"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(peers / "bin" / "python"), "-c", PEFT, str(model(root, shape)), str(adapter(root, shape)), str(out)]
    return measure(synced(command, out))


if __name__ == "__main__":
    main()
