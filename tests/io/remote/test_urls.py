"""Folders behind URLs as inputs: file systems of fsspec (here memory://) and web servers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.fake_hub import FakeHub
from support.hub_machine import merge_of, weights

import mergeforge
from mergeforge.errors import MissingExtraError, SourceError
from mergeforge.execute import executor
from mergeforge.io.remote import retry
from mergeforge.io.remote.fsspec_folder import FsspecRanges
from mergeforge.operations.diff import differences
from mergeforge.planner import make_plan


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.01,) * 3)


@pytest.fixture
def memory(inputs: Path) -> Any:
    """The inputs at memory://store/NAME."""
    fs = fsspec.filesystem("memory")
    for path in inputs.glob("*/*"):
        fs.pipe(f"/store/{path.parent.name}/{path.name}", path.read_bytes())
    yield fs
    fs.store.clear()


def recipe(root: str) -> dict[str, Any]:
    return merge_of(*(f"{root}/{name}" for name in ("base", "tuned", "loan")))


def test_merges_from_an_fsspec_file_system(memory: Any, expected: dict[str, bytes], tmp_path: Path) -> None:
    plan = make_plan(recipe("memory://store"), out=tmp_path / "out", memory="128MiB")
    assert plan.budget.remote_cache and plan.peak <= 128 << 20
    assert weights(executor.run_plan(plan)) == expected
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_merges_from_a_web_server(hub: FakeHub, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The server cannot list files, so the usual names are requested. It never sees a token."""
    served = merge_of(*(f"{hub.url}/org/{name}/resolve/main" for name in ("base", "tuned", "loan")))
    assert weights(mergeforge.merge(served, out=tmp_path / "out")) == expected
    assert all(request["auth"] is None for request in hub.log)


def test_reads_a_sharded_model_from_a_web_server(
    hub: FakeHub, inputs: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    recipe = {"merge_method": "passthrough", "output": {"shard_size": 5_000_000}}
    merged = mergeforge.merge({**recipe, "models": [str(inputs / "base")]}, out=tmp_path / "shards")
    hub.add_repo("org/shards", {path.name: path.read_bytes() for path in merged.iterdir()})
    url = f"{hub.url}/org/shards/resolve/main/"
    assert weights(mergeforge.merge({**recipe, "models": [url]}, out=tmp_path / "out")) == weights(merged)


def test_reads_one_file_behind_a_url(memory: Any, inputs: Path, tmp_path: Path) -> None:
    """The config.json and tokenizer of its folder are used."""
    memory.mv("/store/base/model.safetensors", "/store/base/other.safetensors")
    recipe: dict[str, Any] = {"merge_method": "passthrough"}
    remote = mergeforge.merge({**recipe, "models": ["memory://store/base/other.safetensors"]}, out=tmp_path / "out")
    local = mergeforge.merge({**recipe, "models": [str(inputs / "base")]}, out=tmp_path / "local")
    assert (
        weights(remote) == weights(local)
        and (remote / "config.json").read_text() == (local / "config.json").read_text()
    )


def test_detects_a_file_that_changes_while_it_is_read(memory: Any, tmp_path: Path) -> None:
    plan = make_plan(recipe("memory://store"), out=tmp_path / "out", threads=1, memory="32MiB")
    tiles = executor.run_tiles(plan)
    next(tiles)
    memory.pipe("/store/tuned/model.safetensors", memory.cat("/store/tuned/model.safetensors"))
    with pytest.raises(SourceError, match=r"memory://store/tuned/model.safetensors changed while it was read"):
        list(tiles)
    assert not weights(tmp_path / "out")


def test_retries_failed_and_short_responses(
    memory: Any, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, requests = memory.cat_file, []

    def cat_file(path: str, start: int, end: int) -> bytes:
        requests.append(path)
        if len(requests) in (20, 30):
            raise ConnectionResetError
        return bytes(original(path, start=start, end=end)[: -1 if len(requests) == 40 else None])

    monkeypatch.setattr(memory, "cat_file", cat_file)
    assert weights(mergeforge.merge(recipe("memory://store"), out=tmp_path / "out")) == expected
    monkeypatch.setattr(memory, "cat_file", lambda path, start, end: b"")
    with pytest.raises(SourceError, match="cannot be read: 0 bytes came"):
        make_plan(recipe("memory://store"), out=tmp_path / "other")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:secret@host/model", "has a password or a query in its URL"),
        ("https://host/model?token=secret", "has a password or a query in its URL"),
        ("nothing://x/y", "nothing://x/y cannot be read: ValueError: Protocol not known: nothing"),
        ("memory://store/absent", "memory://store/absent cannot be read: FileNotFoundError"),
        ("http://127.0.0.1:9/model", "http://127.0.0.1:9/model/config.json cannot be read"),
        ("hf://a/b/c", "there is no a/b/c"),
    ],
)
def test_refuses_bad_urls(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        make_plan({"merge_method": "passthrough", "models": [url]}, out=tmp_path / "out")
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_names_the_package_if_fsspec_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingExtraError) as caught:
        make_plan({"merge_method": "passthrough", "models": ["s3://bucket/model"]}, out=tmp_path / "out")
    assert 'pip install "fsspec>=2024.5"' in caught.value.hint


def test_diff_refuses_urls(memory: Any, inputs: Path) -> None:
    with pytest.raises(SourceError, match="can only be read by run and plan"):
        list(differences("memory://store/base", str(inputs / "base")))


def test_pins_the_state_that_a_file_system_reports(memory: Any) -> None:
    ranges = FsspecRanges(memory, "/store/base/config.json", "memory://store/base/config.json")
    assert ranges.etag.startswith("created=") and ranges.size > 0
