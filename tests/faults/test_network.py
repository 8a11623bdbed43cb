"""A Hub that fails at any request, once or for good: asked again or told in our words, and nothing wrong is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.faults.hubs import TALKS, Talks
from support.faults.scenarios import assert_told
from support.faults.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
ONCE: dict[str, dict[str, Any]] = {
    "500": {"kind": "status", "code": 500},
    "503, later": {"kind": "status", "code": 503, "headers": {"Retry-After": "0"}},
    "429": {"kind": "status", "code": 429, "headers": {"Retry-After": "0"}},
    "403": {"kind": "status", "code": 403},
    "reset at once": {"kind": "drop"},
    "reset on the way": {"kind": "drop", "after": 200},
    "ended early": {"kind": "short", "after": 200},
    "done, and the answer lost": {"kind": "lost_response"},
    "a flipped byte": {"kind": "corrupt"},
}


def disturb(
    talks: Talks, name: str, place: Path, number: int, fault: dict[str, Any], tally: Tally, *, lasting: bool = False
) -> None:
    """A talk with a fault at a request, or from there on: it ends well or in our words, and goes on."""
    talk = talks[name]

    def act(at: int, stage: str, path: str) -> dict[str, Any] | None:
        if fault["kind"] == "corrupt" and not ("/cdn/" in path or "/resolve/" in path):
            return None  # TLS keeps what else there is
        return fault if at == number or (lasting and at > number) else None

    folder = talks.begin(talk, place)
    talks.hub.act = act
    ended = talks.start(talk, folder).wait()
    talks.hub.settle()
    with tally.run():
        if ended.code:
            assert_told(ended)
        talks.assert_nothing_half_done(talk, folder)
        talks.assert_goes_on(talk, folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("how", ONCE)
@pytest.mark.parametrize("name", TALKS)
def test_a_fault_at_every_request(talks: Talks, tmp_path: Path, tally: Tally, name: str, how: str) -> None:
    for number in range(1, talks[name].requests + 1):
        disturb(talks, name, tmp_path, number, ONCE[how], tally)


@pytest.mark.parametrize("how", ["500", "429", "reset on the way", "a flipped byte"])
@pytest.mark.parametrize("name", TALKS)
def test_a_hub_that_keeps_failing(talks: Talks, tmp_path: Path, tally: Tally, name: str, how: str) -> None:
    for number in range(1, talks[name].requests + 1, 2):
        disturb(talks, name, tmp_path, number, ONCE[how], tally, lasting=True)
