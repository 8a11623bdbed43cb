"""Tokens and rows against what mergekit 0.1.5 made of the same recipes, as tools/golden_tokenizers recorded it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_llamas import EMBEDDING, HEAD, loaded, maps, projected, write_all, written
from test_tokenizers_against_mergekit import CASES, folders, ours

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_mergekit.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    write_all(root)
    return root


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_and_rows_match_the_golden_files(root: Path, name: str) -> None:
    plan, recorded = ours(root, CASES[name]), GOLDEN[name]
    vocabulary = loaded(written(plan, root / name)).get_vocab()
    assert (len(vocabulary), plan.size) == (recorded["tokens"], recorded["rows"])
    for tensor, sums in zip((EMBEDDING, HEAD), recorded["sums"], strict=True):
        merged: Any = sum(maps(folders(root, CASES[name]), plan, tensor).values())
        assert projected(merged, vocabulary) == pytest.approx(sums, rel=0, abs=1e-4)
