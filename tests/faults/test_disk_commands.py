"""Commands on a disk that fails, fills up or allows little: told in our words, nothing half done, and they go on."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path

import pytest
from support.faults.scenarios import NAMES, Scenarios, assert_told
from support.faults.tally import Tally
from support.faults.tracing import need_strace, traced
from support.faults.warm import Warm

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
# A system call, how it fails, in which threads, and the distance of two places in a long sweep.
FAILURES = [
    ("pwrite64", "ENOSPC", True, 1),
    ("write", "ENOSPC", False, 2),
    ("fallocate", "ENOSPC", False, 1),
    ("mkdir", "ENOSPC", False, 2),
    ("fsync", "EIO", False, 3),
    ("rename", "EIO", False, 1),
    ("unlink", "EIO", False, 1),
    ("preadv2", "EIO", True, 2),
    ("openat", "EMFILE", False, 4),
]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gguf"])
@pytest.mark.parametrize(("call", "error", "everywhere", "step"), FAILURES, ids=lambda value: str(value))
def test_a_failing_system_call(
    scenarios: Scenarios,
    warm: Warm,
    tmp_path: Path,
    tally: Tally,
    name: str,
    call: str,
    error: str,
    everywhere: bool,
    step: int,
) -> None:
    need_strace(warm)
    scenario, untouched = scenarios[name], 0
    for number in count(1, step):
        folder = scenario.place(tmp_path)
        ended = traced(warm, scenario.arguments, folder, call, f"error={error}:when={number}", everywhere=everywhere)
        untouched = untouched + 1 if ended.code == 0 else 0
        if untouched > 3:  # it is past the last one
            break
        with tally.run() if ended.code else nullcontext():
            if ended.code:
                assert_told(ended)
            scenario.assert_nothing_half_done(folder)
            scenario.assert_goes_on(warm, folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_size_limit(scenarios: Scenarios, warm: Warm, tmp_path: Path, tally: Tally, name: str) -> None:
    """RLIMIT_FSIZE: the file system refuses what goes beyond (EFBIG)."""
    scenario = scenarios[name]
    for size in (500, 1000, 3000, 5000, 8000, 12_000, 50_000, 200_000, 400_000):
        folder = scenario.place(tmp_path)
        ended = warm.run(scenario.arguments, folder, limits={"RLIMIT_FSIZE": size})
        with tally.run():
            if ended.code:
                assert_told(ended)
                assert ended.code == 4, ended
            scenario.assert_nothing_half_done(folder)
            scenario.assert_goes_on(warm, folder)
        shutil.rmtree(folder)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which a test may fill."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("cannot mount")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """A file that takes all the room but `leave` bytes."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for _ in range((shutil.disk_usage(place).free - leave) // 4096 + 1):
            file.write(b"\1" * 4096)
    return filler


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_full_from_the_start(
    scenarios: Scenarios, warm: Warm, small: Path, tally: Tally, name: str
) -> None:
    scenario = scenarios[name]
    for room in (0, 4096, 20_000, 100_000):
        folder = scenario.place(small)
        filler = fill(small, room)
        ended = warm.run(scenario.arguments, folder)
        with tally.run():
            if name != "extract" or ended.code:
                assert_told(ended)
                assert ended.code == 4, ended
            scenario.assert_nothing_half_done(folder)
            filler.unlink()
            scenario.assert_goes_on(warm, folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fills_up(scenarios: Scenarios, warm: Warm, small: Path, tally: Tally, name: str) -> None:
    """At a random moment somebody else takes all that is free."""
    scenario, chance = scenarios[name], random.Random(3)
    for _ in range(25):
        folder = scenario.place(small)
        child = warm.start(scenario.arguments, folder, eager=True)
        time.sleep(chance.uniform(0, 0.15))
        filler = fill(small)
        ended = child.wait()
        with tally.run():
            if ended.code:
                assert_told(ended)
                assert ended.code == 4, ended
            scenario.assert_nothing_half_done(folder)
            filler.unlink()
            scenario.assert_goes_on(warm, folder)
        shutil.rmtree(folder)
