"""Models that most of these tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_llamas import write_three


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models whose tokens partly overlap; b and c add tokens that a lacks."""
    return write_three(tmp_path_factory.mktemp("three"))
