"""Commands that may open few files, or take little memory: done, or refused in our words, and they go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.faults.scenarios import NAMES, Scenarios, assert_told
from support.faults.tally import Tally
from support.faults.warm import Warm

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("name", NAMES)
def test_few_open_files(scenarios: Scenarios, warm: Warm, tmp_path: Path, tally: Tally, name: str) -> None:
    starve(scenarios, warm, tmp_path, tally, name, "RLIMIT_NOFILE", range(3, 40, 1))


@pytest.mark.parametrize("name", NAMES)
def test_little_memory(scenarios: Scenarios, warm: Warm, tmp_path: Path, tally: Tally, name: str) -> None:
    """RLIMIT_DATA: so many bytes more than a process has that has imported everything.

    A thread takes 8 MiB for its stack. Python (before 3.13.10, gh-140746) waits forever for one that got the stack and
    not the few bytes after it, so there is a gap.
    """
    sizes = [0, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 4 << 20, 7 << 20, *range(10 << 20, 64 << 20, 2 << 20)]
    starve(scenarios, warm, tmp_path, tally, name, "DATA_MORE", sizes)


def starve(
    scenarios: Scenarios, warm: Warm, place: Path, tally: Tally, name: str, limit: str, values: range | list[int]
) -> None:
    scenario, enough = scenarios[name], 0
    for value in values:
        folder = scenario.place(place)
        ended = warm.run(scenario.arguments, folder, limits={limit: value}, eager=True)
        with tally.run():
            if ended.code > 0:  # LLVM, for one, ends the process where it gets no memory: that is a kill
                assert_told(ended)
            scenario.assert_nothing_half_done(folder)
            scenario.assert_goes_on(warm, folder)
        shutil.rmtree(folder)
        enough = enough + 1 if ended.code == 0 else 0
        if enough > 2:
            return
