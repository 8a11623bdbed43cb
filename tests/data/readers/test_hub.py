"""Data sets on a local fake Hub: which files are used, and what goes wrong.

huggingface_hub reads its environment at import, so each test runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub

from mergeforge.data.readers.hub import hub_files, select_files
from mergeforge.errors import RecipeError, SourceError

READ = """
import json, sys
from mergeforge.data.readers.open import read_records, source_files
from mergeforge.data.settings import DataSource
from mergeforge.errors import MergeforgeError
source = DataSource(sys.argv[1])
try:
    rows = [row for file in source_files(source) for row in read_records(source, file)]
    print(json.dumps([[row.place, row.value] for row in rows]))
except MergeforgeError as error:
    print(json.dumps({"error": str(error), "hint": error.hint, "code": error.exit_code}))
"""
TRAIN, TEST = b'{"text": "train"}\n', b'{"text": "test"}\n'


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


def read(hub: FakeHub, home: Path, path: str, **env: str) -> Any:
    environment = {
        **hub.env(),
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PATH": "/usr/bin:/bin",
        **env,
    }
    result = subprocess.run(
        [sys.executable, "-c", READ, path], env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_split_is_downloaded_and_stays_available_offline(hub: FakeHub, tmp_path: Path) -> None:
    files = {"data/train.jsonl": TRAIN, "data/test.jsonl": TEST, "README.md": b"about"}
    first = hub.add_repo("org/set", files, type="dataset")
    assert read(hub, tmp_path, "hf://org/set") == [["hf://org/set:1", {"text": "train"}]]
    assert not any("test.jsonl" in request["path"] for request in hub.log if "/resolve/" in request["path"])
    assert read(hub, tmp_path, "hf://org/set", HF_HUB_OFFLINE="1")[0][1] == {"text": "train"}
    assert read(hub, tmp_path, "hf://org/set:test")[0][1] == {"text": "test"}
    hub.push("org/set", {"data/train.jsonl": b'{"text": "newer"}\n'}, type="dataset")
    assert read(hub, tmp_path, "hf://org/set:data/train.jsonl")[0][1] == {"text": "newer"}
    assert read(hub, tmp_path, f"hf://org/set@{first}")[0][1] == {"text": "train"}


def test_missing_data_set(hub: FakeHub, tmp_path: Path) -> None:
    error = read(hub, tmp_path, "hf://org/none")
    assert error["code"] == 3
    assert "data set org/none: the Hub says" in error["error"]


SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


@pytest.mark.parametrize(
    ("names", "what", "expected"),
    [
        ([*SHARDS, "data/test-00000-of-00001.parquet"], "", SHARDS),
        (["train.json", "train.csv", "train.parquet"], "", ["train.parquet"]),
        (["a.jsonl", "b.jsonl", "eval.jsonl", "README.md", "dev.jsonl"], "", ["a.jsonl", "b.jsonl"]),
        (["main/train.jsonl", "socratic/train.jsonl"], "main/train", ["main/train.jsonl"]),
        (["main/train.jsonl", "main/test.jsonl"], "main/test", ["main/test.jsonl"]),
        (["a/valid.jsonl"], "validation", ["a/valid.jsonl"]),
        (["x/1.jsonl", "y/2.jsonl"], "*/?.jsonl", ["x/1.jsonl", "y/2.jsonl"]),
        (["restrained.jsonl"], "", ["restrained.jsonl"]),
    ],
)
def test_files_of_a_split(names: list[str], what: str, expected: list[str]) -> None:
    assert select_files(names, what, "hf://org/set") == expected


@pytest.mark.parametrize(
    ("names", "what", "message", "hint"),
    [
        (["main/train.jsonl", "socratic/train.jsonl"], "", "holds several data sets: main, socratic", ":main/train"),
        (["train.jsonl"], "test", "holds no data file for 'test'", "it holds: train.jsonl"),
        (["model.safetensors"], "", "holds no data file", "it holds: model.safetensors"),
    ],
)
def test_refuses_missing_and_ambiguous_splits(names: list[str], what: str, message: str, hint: str) -> None:
    with pytest.raises(SourceError, match=message) as error:
        select_files(names, what, "hf://org/set")
    assert hint in error.value.hint


def test_refuses_a_malformed_path() -> None:
    with pytest.raises(RecipeError, match="is not a Hub data set"):
        hub_files("hf://a/b/c/d")
