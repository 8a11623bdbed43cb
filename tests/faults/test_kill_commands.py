"""Commands that are killed at the Nth system call of a kind, and at random moments: the same command goes on."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path

import pytest
from scenarios import NAMES, Scenario, Scenarios
from tally import Tally
from warm import KILLED, Warm

# System calls that change the disk, and openat; with the distance of two kill points of a long sweep.
CALLS = {"pwrite64": 1, "write": 2, "fsync": 3, "rename": 1, "unlink": 1, "mkdir": 2, "rmdir": 1}
CALLS |= {"fallocate": 1, "ftruncate": 1, "openat": 5}
pytestmark = pytest.mark.faults


def killed_at(warm: Warm, scenario: Scenario, folder: Path, call: str, number: int, everywhere: bool) -> bool:
    """Run it until a thread (the main thread alone, or any) makes its `number`-th such call; whether it got there."""
    child = warm.start(scenario.arguments, folder, traced=True, eager=True)
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}", "-p", str(child.pid)]
    subprocess.run(["strace", "-qq", "-o", "/dev/null", *(["-f"] if everywhere else []), *inject], capture_output=True)
    ended = child.wait()
    assert ended.code in (0, KILLED), ended
    return ended.code == KILLED


def can_trace(warm: Warm) -> bool:
    """Whether strace is here, and may look at other processes."""
    if shutil.which("strace") is None:
        return False
    child = warm.start(["list", "methods"], traced=True)
    traced = subprocess.run(["strace", "-qq", "-o", "/dev/null", "-p", str(child.pid)], capture_output=True)
    if traced.returncode:
        child.kill()
    return child.wait().code == 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_the_nth_system_call(
    scenarios: Scenarios, warm: Warm, tmp_path: Path, tally: Tally, name: str
) -> None:
    if not can_trace(warm):
        pytest.skip("no strace")
    scenario, stride = scenarios[name], 4 if name == "gguf" else 1  # that one takes its time
    for call, step in CALLS.items():
        for everywhere in (False, True) if call == "pwrite64" else (False,):
            for number in count(1, step * stride):
                folder = scenario.place(tmp_path)
                if not killed_at(warm, scenario, folder, call, number, everywhere):
                    break
                with tally.run():
                    scenario.assert_nothing_half_done(folder)
                    scenario.assert_goes_on(warm, folder)
                shutil.rmtree(folder)
    assert tally.counts[0] > 20


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(scenarios: Scenarios, warm: Warm, tmp_path: Path, tally: Tally, name: str) -> None:
    """Again and again, while it goes on after a kill, too."""
    scenario, chance = scenarios[name], random.Random(7)
    started = time.monotonic()
    assert warm.run(scenario.arguments, scenario.place(tmp_path), eager=True).code == 0
    seconds = time.monotonic() - started
    kills = 0
    while kills < 40:
        folder = scenario.place(tmp_path)
        for _ in range(4):
            child = warm.start(scenario.arguments, folder, eager=chance.random() < 0.7)
            time.sleep(chance.uniform(0.0, seconds))
            child.kill()
            if child.wait().code != KILLED:
                break
            kills += 1
            with tally.run():
                scenario.assert_nothing_half_done(folder)
        scenario.assert_goes_on(warm, folder)
        shutil.rmtree(folder)
