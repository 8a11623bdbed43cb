"""Tokenizers that most data tests use: byte-level, so that the ids of a text can be written by hand."""

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
    """Without a chat template, BOS or anything added."""
    return load_tokenizer(str(folder))
