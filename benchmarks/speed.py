#!/usr/bin/env python3
"""Folding one r=16 all-linear bf16 adapter, against the raw copy and `cp` of the same bytes.

    python benchmarks/speed.py --dir DIR [--shapes 3b,7b] [--rounds 3]

Whole processes, results fsynced, each method once a round in turn, the inputs not in the page cache.
The time of importing torch, measured in the same run, is subtracted from mergeforge's time.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from measure import (
    PYTHON,
    Measured,
    adapter,
    import_seconds,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the disk to be measured")
    parser.add_argument("--shapes", default="3b,7b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="256MiB")
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    importing = import_seconds()
    print(f"{machine()}; importing torch {importing:.1f} s; --memory {given.memory}\n")
    rows = [_row(given.dir, shape, given.rounds, given.memory, importing) for shape in given.shapes.split(",")]
    head = ["shape", "bytes", "raw copy s", "cp + sync s", "fold s", "fold / raw", "fold / cp", "peak MiB"]
    print(table(head, rows))


def _row(root: Path, shape: str, rounds: int, memory: str, importing: float) -> list[str]:
    base, lora, out = model(root, shape), adapter(root, shape), root / "out"
    raw = Path(__file__).with_name("raw_copy.py")

    def cold(run: Callable[[], Measured]) -> Measured:
        shutil.rmtree(out, ignore_errors=True)
        prepare_cache([base], cached=False)
        return run()

    recipe: dict[str, object] = {"base_model": str(base), "adapters": [str(lora)]}
    copying = synced(["cp", "-r", "--reflink=never", str(base), str(out)], out)
    cases = {
        "raw": lambda: cold(lambda: measure([PYTHON, str(raw), str(base), str(out)])),
        "fold": lambda: cold(lambda: mergeforge(recipe, out, "--memory", memory)),
        "cp": lambda: cold(lambda: measure(copying)),
    }
    found = in_turn(rounds, cases)
    shutil.rmtree(out, ignore_errors=True)
    seconds = {
        name: [one.seconds - (importing if name == "fold" else 0) for one in runs] for name, runs in found.items()
    }
    middle = {name: sorted(runs)[len(runs) // 2] for name, runs in seconds.items()}
    ratios = {name: [f / x for f, x in zip(seconds["fold"], seconds[name], strict=True)] for name in ("raw", "cp")}
    nbytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    return [
        shape,
        f"{nbytes / 1e9:.1f} GB",
        *(_spread(seconds[name]) for name in ("raw", "cp", "fold")),
        f"{sorted(ratios['raw'])[rounds // 2]:.2f}",
        f"{middle['fold'] / middle['cp']:.2f}",
        f"{median(found['fold'], lambda one: one.peak) / 2**20:.0f}",
    ]


def _spread(seconds: list[float]) -> str:
    return f"{sorted(seconds)[len(seconds) // 2]:.1f} ({min(seconds):.1f}-{max(seconds):.1f})"


if __name__ == "__main__":
    main()
