"""Two commands at once that write to the same place: one does it, the other is told so, and the result is right."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults.breaking import digests
from support.faults.scenarios import Scenario, Scenarios, assert_told, difference
from support.faults.tally import Tally
from support.faults.tracing import following, need_strace
from support.faults.warm import Warm

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
SAID = (
    "another run writes",
    "already holds",
    "exists",
    "another merge",
    "no merge of mergeforge wrote",
)


@pytest.fixture(scope="module")
def other() -> Iterator[Warm]:
    with Warm() as server:
        yield server


def assert_one_won(folder: Path, codes: list[int], *scenarios: Scenario) -> None:
    assert 0 in codes, codes
    held = digests(folder)
    assert held in [one.reference for one in scenarios], [difference(held, one.reference) for one in scenarios]


@pytest.mark.parametrize("name", ["fold", "replace", "gguf", "join", "export", "extract"])
def test_the_same_command_twice(
    scenarios: Scenarios, warm: Warm, other: Warm, tmp_path: Path, tally: Tally, name: str
) -> None:
    together(scenarios[name], scenarios[name], warm, other, tmp_path, tally)


def test_two_merges_into_one_folder(
    scenarios: Scenarios, warm: Warm, other: Warm, tmp_path: Path, tally: Tally
) -> None:
    together(scenarios["fold"], scenarios["join"], warm, other, tmp_path, tally)


def together(one: Scenario, two: Scenario, warm: Warm, other: Warm, place: Path, tally: Tally) -> None:
    chance = random.Random(11)
    for _ in range(50):
        folder = one.place(place)
        children = [warm.start(one.arguments, folder), other.start(two.arguments, folder)]
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0, 0.05))
        ended = [child.wait() for child in children]
        with tally.run():
            for each in ended:
                if each.code:
                    assert_told(each)
                    assert each.code == 5 and any(said in each.err for said in SAID), each
            assert_one_won(folder, [each.code for each in ended], one, two)
        shutil.rmtree(folder)


@pytest.mark.parametrize("call", ["rename", "unlink", "rmdir", "fsync", "openat", "mkdir"])
@pytest.mark.parametrize("name", ["fold", "export", "extract"])
def test_a_second_command_starts_while_the_first_one_waits(
    scenarios: Scenarios, warm: Warm, other: Warm, tmp_path: Path, tally: Tally, name: str, call: str
) -> None:
    """The first is held up for 0.3 s at one of its calls; the second does what it will meanwhile."""
    need_strace(warm)
    scenario, chance = scenarios[name], random.Random(5)
    for number in (1, 2, 3, 4, 6, 9, 13):
        folder = scenario.place(tmp_path)
        first = warm.start(scenario.arguments, folder, traced=True)
        delay = f"inject={call}:{chance.choice(['delay_enter', 'delay_exit'])}=300000:when={number}"
        with following(first, "-e", f"trace={call}", "-e", delay):
            time.sleep(0.15)
            second = other.run(scenario.arguments, folder)
        with tally.run():
            ended = [first.wait(), second]
            for each in ended:
                if each.code:
                    assert_told(each)
                    assert each.code == 5, each
            assert_one_won(folder, [each.code for each in ended], scenario)
        shutil.rmtree(folder)
