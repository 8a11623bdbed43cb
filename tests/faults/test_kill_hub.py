"""Publishing, downloading and streaming, killed at every request and at random moments."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.faults.hubs import TALKS, Talks
from support.faults.tally import Tally
from support.faults.warm import KILLED, Child

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("stage", ["status", "drop"], ids=["before", "after"])
@pytest.mark.parametrize("name", TALKS)
def test_killed_at_every_request(talks: Talks, tmp_path: Path, tally: Tally, name: str, stage: str) -> None:
    """Before the Hub does what it is asked, or after it, when the answer finds nobody."""
    talk = talks[name]
    for number in range(1, talk.requests + 1):
        folder = talks.begin(talk, tmp_path)
        running: list[Child] = []

        def kill(
            at: int, when: str, path: str, number: int = number, running: list[Child] = running
        ) -> dict[str, Any] | None:
            if at == number and when == stage:
                while not running:
                    time.sleep(0.001)
                running[0].kill()
                time.sleep(0.005)
            return None

        talks.hub.act = kill
        running.append(talks.start(talk, folder))
        ended = running[0].wait()
        talks.hub.settle()
        with tally.run():
            assert ended.code == KILLED, ended
            talks.assert_nothing_half_done(talk, folder)
            talks.assert_goes_on(talk, folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", TALKS)
def test_killed_at_random_moments_of_a_transfer(talks: Talks, tmp_path: Path, tally: Tally, name: str) -> None:
    talk, chance = talks[name], random.Random(13)
    folder = talks.begin(talk, tmp_path)
    started = time.monotonic()
    assert talks.start(talk, folder).wait().code == 0
    seconds, kills = time.monotonic() - started, 0
    while kills < 30:
        folder = talks.begin(talk, tmp_path)
        for _ in range(4):
            child = talks.start(talk, folder)
            time.sleep(chance.uniform(0, seconds))
            child.kill()
            if child.wait().code != KILLED:
                break
            talks.hub.settle()
            kills += 1
            with tally.run():
                talks.assert_nothing_half_done(talk, folder)
        talks.assert_goes_on(talk, folder)
        shutil.rmtree(folder)
