"""The merge that the tests here break, what they break it with, and the table of what survived."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.faults.breaking import Operation, Strikes, World
from support.faults.hubs import Talks, Wire
from support.faults.scenarios import Scenarios
from support.faults.tally import KEY, Tally, kind_of, table
from support.faults.warm import Warm

from mergeforge.execute import executor


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: the runs here sync thousands of times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 1 << 30:
        yield tmp_path_factory.mktemp("faults")
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="mergeforge-faults-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(disk: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=disk))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def world(disk: Path) -> World:
    return World(disk / "world")


@pytest.fixture(scope="session")
def warm(world: World, disk: Path) -> Iterator[Warm]:
    with Warm() as server:
        server.learn(world.command(disk / "learned" / "out"))
        yield server


@pytest.fixture(scope="session")
def scenarios(world: World, warm: Warm, disk: Path) -> Scenarios:
    return Scenarios(world, warm, disk / "scenarios")


@pytest.fixture(scope="session")
def talks(world: World, disk: Path) -> Iterator[Talks]:
    (disk / "talks").mkdir()
    with Wire() as hub, Warm(**hub.env(), HF_HOME=str(disk / "cache"), HF_HUB_DISABLE_PROGRESS_BARS="1") as warm:
        yield Talks(hub, warm, disk / "cache", disk / "talks", world)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Counts the runs of a test for the table; a test that counts none is one run."""
    counted = Tally()
    request.node.user_properties.append((KEY, counted.counts))
    return counted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", action="store_true", help="Print what was broken how often, and what survived.")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--table", False):
        return
    reports = [one for some in terminalreporter.stats.values() for one in some if isinstance(one, pytest.TestReport)]
    terminalreporter.write_line(table([one for one in reports if kind_of(one)]))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile is made durable on its own, so that there are more places to break."""
    monkeypatch.setattr(executor, "SYNC_SECONDS", 0.0)


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Strikes]:
    """strike(names, at, action): call action(original, *arguments) instead of the `at`-th call (1-based) of
    os.NAME, counted over all the names."""

    def start(
        names: tuple[str, ...],
        at: int,
        action: Operation,
        *,
        lasting: bool = False,
        patch: pytest.MonkeyPatch = monkeypatch,
    ) -> Strikes:
        strikes = Strikes(at, action, lasting)
        for name in names:
            patch.setattr(os, name, strikes.around(getattr(os, name)))
        return strikes

    return start
