"""Programs of the environment that holds mergekit (tools/peers makes it)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.paths import PEERS


def peer_program(name: str = "python") -> Path:
    """A program of mergekit's environment; skips the test if it is not there."""
    program = PEERS / "bin" / name
    if not program.exists():
        pytest.skip(f"mergekit is not there: no {program} (set MERGEFORGE_PEERS to a venv with mergekit 0.1.5)")
    return program
