"""The merge that the tests here break, and what they break it with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from breaking import Operation, Strikes, World

from mergeforge import running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile is made durable on its own, so that there are more places to break."""
    monkeypatch.setattr(running, "SYNC_SECONDS", 0.0)


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
