"""Models that most of these tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_llamas import write_three


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models, the tokens of which overlap in part; b and c add tokens that a has not."""
    return write_three(tmp_path_factory.mktemp("three"))
