"""The byte-level tokenizer of most data tests: the ids of a text can be written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeforge.data import load_tokenizer
from mergeforge.operations.synthetic_models import SHAPES, write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tokenizer") / "base", SHAPES["tiny"])


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    """The tokenizer, without chat template, BOS or added tokens."""
    return load_tokenizer(str(folder))
