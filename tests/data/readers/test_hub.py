"""Data sets of a Hub that stands on the loopback: which files are taken, and what goes wrong.

huggingface_hub reads its environment when it is imported, so each asks in a process of its own.
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

from mergeforge.data.readers.hub import chosen, hub_files
from mergeforge.errors import RecipeError, SourceError

READ = """
import json, sys
from mergeforge.data.rows import files_of, rows_of
from mergeforge.data.settings import DataSource
from mergeforge.errors import MergeforgeError
source = DataSource(sys.argv[1])
try:
    rows = [row for file in files_of(source) for row in rows_of(source, file)]
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
    everything = {
        **hub.env(),
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PATH": "/usr/bin:/bin",
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", READ, path], env=everything, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_split_comes_from_the_hub_and_stays_when_offline(hub: FakeHub, tmp_path: Path) -> None:
    files = {"data/train.jsonl": TRAIN, "data/test.jsonl": TEST, "README.md": b"about"}
    first = hub.add_repo("org/set", files, type="dataset")
    assert read(hub, tmp_path, "hf://org/set") == [["hf://org/set:1", {"text": "train"}]]
    assert not any("test.jsonl" in one["path"] for one in hub.log if "/resolve/" in one["path"])
    assert read(hub, tmp_path, "hf://org/set", HF_HUB_OFFLINE="1")[0][1] == {"text": "train"}
    assert read(hub, tmp_path, "hf://org/set:test")[0][1] == {"text": "test"}
    hub.push("org/set", {"data/train.jsonl": b'{"text": "newer"}\n'}, type="dataset")
    assert read(hub, tmp_path, "hf://org/set:data/train.jsonl")[0][1] == {"text": "newer"}
    assert read(hub, tmp_path, f"hf://org/set@{first}")[0][1] == {"text": "train"}


def test_a_data_set_that_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    found = read(hub, tmp_path, "hf://org/none")
    assert found["code"] == 3
    assert "data set org/none: the Hub says" in found["error"]


SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


@pytest.mark.parametrize(
    ("names", "what", "want"),
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
def test_which_files_are_a_split(names: list[str], what: str, want: list[str]) -> None:
    assert chosen(names, what, "hf://org/set") == want


@pytest.mark.parametrize(
    ("names", "what", "said", "hint"),
    [
        (["main/train.jsonl", "socratic/train.jsonl"], "", "several sets of data: main, socratic", ":main/train"),
        (["train.jsonl"], "test", "holds no data file for 'test'", "it holds: train.jsonl"),
        (["model.safetensors"], "", "holds no data file", "it holds: model.safetensors"),
    ],
)
def test_what_is_no_split(names: list[str], what: str, said: str, hint: str) -> None:
    with pytest.raises(SourceError, match=said) as error:
        chosen(names, what, "hf://org/set")
    assert hint in error.value.hint


def test_a_path_that_is_none() -> None:
    with pytest.raises(RecipeError, match="is no data set of the Hub"):
        hub_files("hf://a/b/c/d")
