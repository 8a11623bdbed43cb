"""Commands that are killed at the Nth system call of a kind, and at random moments: the same command goes on."""

from __future__ import annotations

import random
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
from support.faults.scenarios import NAMES, Scenarios
from support.faults.tally import Tally
from support.faults.tracing import need_strace, traced
from support.faults.warm import KILLED, Warm

# System calls that change the disk, and openat; with the distance of two kill points of a long sweep.
CALLS = {"pwrite64": 1, "write": 2, "fsync": 3, "rename": 1, "unlink": 1, "mkdir": 2, "rmdir": 1}
CALLS |= {"fallocate": 1, "ftruncate": 1, "openat": 5}
pytestmark = pytest.mark.faults


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_the_nth_system_call(
    scenarios: Scenarios, warm: Warm, tmp_path: Path, tally: Tally, name: str
) -> None:
    need_strace(warm)
    scenario, stride = scenarios[name], 4 if name == "gguf" else 1  # that one takes its time
    for call, step in CALLS.items():
        for everywhere in (False, True) if call == "pwrite64" else (False,):
            for number in count(1, step * stride):
                folder = scenario.place(tmp_path)
                ended = traced(
                    warm, scenario.arguments, folder, call, f"signal=KILL:when={number}", everywhere=everywhere
                )
                if ended.code != KILLED:
                    assert ended.code == 0, ended
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
