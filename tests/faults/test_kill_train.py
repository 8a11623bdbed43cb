"""A training run killed at random moments and at system calls: it goes on, and ends in the same adapter."""

from __future__ import annotations

import json
import random
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from support.faults.tally import Tally
from support.faults.tracing import need_strace, traced
from support.faults.warm import KILLED, Warm

from mergeforge.operations.synthetic_models import SHAPES, write_model

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
COMMAND = ("train", "../train.yaml", "-q", "--out", "run")
WORDS = ["a", "merge", "model", "weight", "adapter", "base", "bank", "loan", "risk", "rate"]


@pytest.fixture(scope="module")
def training(warm: Warm, disk: Path) -> Path:
    """A folder with what is needed, and in `whole` a run that nobody disturbed."""
    root = disk / "training"
    write_model(root / "base", SHAPES["tiny"], seed=0, std=0.05)
    chance = random.Random(1)
    rows = [{"prompt": " ".join(chance.sample(WORDS, 3)), "response": chance.choice(WORDS)} for _ in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(root / "base"), "data": str(root / "rows.jsonl"), "method": "lora", "epochs": 2}
    settings |= {"batch": {"size": 4}, "save": {"every": 1, "keep": 2}, "val": 4}
    (root / "train.yaml").write_text(yaml.safe_dump(settings))
    (root / "whole").mkdir()
    ended = warm.learn(COMMAND, root / "whole")
    assert ended.code == 0, ended
    return root


def assert_nothing_half_done(run: Path) -> None:
    """A checkpoint under its name holds all that it takes to go on; run.json, if it is there, is whole."""
    for checkpoint in run.glob("checkpoints/step-*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert {"trainer_state.json", "optimizer.pt", "scheduler.pt"} <= names, names
        json.loads((checkpoint / "trainer_state.json").read_text())
        load_file(checkpoint / "adapter_model.safetensors")
    if (run / "run.json").exists():
        facts = json.loads((run / "run.json").read_text())
        if facts["state"] == "finished":
            load_file(run / "adapter" / "adapter_model.safetensors")


def assert_goes_on(warm: Warm, training: Path, folder: Path) -> None:
    ended = warm.run(COMMAND, folder)
    assert ended.code == 0 or (ended.code == 5 and "holds a finished run" in ended.err), ended
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (training / where / "run" / "adapter" / name for where in ("whole", folder.name))
        assert one.read_bytes() == two.read_bytes(), name
    assert not list((folder / "run" / "checkpoints").glob(".*"))


def place(training: Path) -> Path:
    folder = training / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def test_a_training_run_killed_at_random_moments(training: Path, warm: Warm, tally: Tally) -> None:
    chance, kills = random.Random(2), 0
    started = time.monotonic()
    assert warm.run(COMMAND, place(training)).code == 0
    seconds = time.monotonic() - started
    while kills < 24:
        folder = place(training)
        for _ in range(4):
            child = warm.start(COMMAND, folder)
            time.sleep(chance.uniform(0, seconds))
            child.kill()
            if child.wait().code != KILLED:
                break
            kills += 1
            with tally.run():
                assert_nothing_half_done(folder / "run")
        assert_goes_on(warm, training, folder)


@pytest.mark.parametrize(("call", "step"), [("fsync", 12), ("rename", 5), ("unlink", 9), ("mkdir", 6)])
def test_a_training_run_killed_at_the_nth_system_call(
    training: Path, warm: Warm, tally: Tally, call: str, step: int
) -> None:
    need_strace(warm)
    for number in count(1, step):
        folder = place(training)
        ended = traced(warm, COMMAND, folder, call, f"signal=KILL:when={number}")
        if ended.code != KILLED:
            break
        with tally.run():
            assert_nothing_half_done(folder / "run")
            assert_goes_on(warm, training, folder)
