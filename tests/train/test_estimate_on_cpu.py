"""The plan's memory estimate on a CPU against the peak of a run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergeforge.operations.synthetic_models import ModelShape, write_model

SHAPE = ModelShape(512, 1408, 8, 8, 4, 16384, tied=True)  # 34 M parameters
LONG = " ".join(["river", "stone", "cloud", "tree"] * 14)
SFT = {"prompt": LONG, "response": LONG}
PREFERENCE = {"prompt": LONG, "chosen": LONG, "rejected": LONG + " red"}
PACKED = {"pack": True, "seq_len": 1024, "batch": {"size": 4}}
PADDED = {"pack": False, "batch": {"size": 2}}

CODE = """
import json, resource, sys
from mergeforge.train.environment import silence_libraries
from mergeforge.train.plan import make_plan
from mergeforge.train.run import train

plan = make_plan(json.loads(sys.argv[1]), device="cpu")
with silence_libraries():
    train(plan)
print(json.dumps([plan.resolved.estimate.total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the estimate is fitted to glibc's malloc")
@pytest.mark.parametrize(
    ("row", "settings"),
    [
        (SFT, {"method": "lora", **PACKED}),
        (SFT, {"method": "full", **PADDED}),
        (PREFERENCE, {"method": "lora", "objective": "dpo", **PADDED}),
    ],
    ids=["lora-packed", "full", "dpo"],
)
def test_the_peak_is_at_most_the_estimate_and_at_least_four_fifths(
    row: dict[str, str], settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    run = {"model": str(write_model(tmp_path / "base", SHAPE)), "data": str(tmp_path / "rows.jsonl"), "max_steps": 2}
    run |= {"output": str(tmp_path / "run"), "eval": {"max_tokens": 4}, "save": {"every": 0}, **settings}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(run)], capture_output=True, text=True, check=True, env=environment
    )
    estimate, peak = json.loads(done.stdout.splitlines()[-1])
    assert peak <= estimate <= 1.25 * peak
