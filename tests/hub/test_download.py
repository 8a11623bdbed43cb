"""Download models from a fake Hub: what is downloaded, what is cached, and what goes wrong.

huggingface_hub reads its environment when it is imported, so each test runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub

from mergeforge.errors import SourceError
from mergeforge.hub.download import fetch, needed_files

FETCH = """
import json, sys
from mergeforge.errors import MergeforgeError
from mergeforge.hub.download import fetch
path, revision, stem, pickled = json.loads(sys.argv[1])
try:
    local = fetch(path, revision, (stem,), allow_pickle=pickled)
except MergeforgeError as error:
    result = {"error": str(error), "hint": error.hint, "code": error.exit_code}
else:
    files = {str(file.relative_to(local.path)): file.stat().st_size for file in local.path.rglob("*") if file.is_file()}
    result = {"files": files, "revision": local.revision, "path": str(local.path)}
print(json.dumps(result))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


class Machine:
    """A machine with its own cache, online or offline."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        self.hub = hub
        self.env = {**hub.env(), "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PATH": "/usr/bin:/bin"}

    def run(self, code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.hub.log.clear()
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=100)

    def fetch(
        self, path: str, revision: str | None = None, stem: str = "model", pickled: bool = False, **env: str
    ) -> dict[str, Any]:
        done = self.run(FETCH, json.dumps([path, revision, stem, pickled]), **env)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    @property
    def downloaded(self) -> set[str]:
        """The files that the last run downloaded from the Hub."""
        return {one["path"].rpartition("/")[2] for one in self.hub.log if "/resolve/" in one["path"]}


@pytest.fixture
def machine(hub: FakeHub, tmp_path: Path) -> Machine:
    return Machine(hub, tmp_path / "home")


REPO = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"s" * 3000,
    "pytorch_model.bin": b"p" * 3000,
    "model.gguf": b"g" * 3000,
    "tokenizer.json": b"{}",
    "tokenizer.model": b"t" * 100,
    "chat_template.jinja": b"x",
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"MIT",
    "modeling_evil.py": b"raise SystemExit",
    "onnx/model.onnx": b"o" * 3000,
    "original/model.safetensors": b"o" * 3000,
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md"}
WANTED |= {"LICENSE", "modeling_evil.py"}  # code is copied into a merge, and never run


def test_downloads_only_what_a_merge_reads_and_only_once(hub: FakeHub, machine: Machine) -> None:
    sha = hub.add_repo("org/base", REPO)
    found = machine.fetch("org/base")
    assert found["files"].keys() == WANTED
    assert found["revision"] == sha
    assert machine.downloaded == WANTED
    again = machine.fetch("org/base")
    assert again == found
    assert machine.downloaded == set()


def test_uses_the_cache_offline(hub: FakeHub, machine: Machine) -> None:
    hub.add_repo("org/base", REPO)
    found = machine.fetch("org/base")
    assert machine.fetch("org/base", HF_HUB_OFFLINE="1") == found
    assert not hub.log
    assert machine.fetch("org/base", found["revision"], HF_HUB_OFFLINE="1") == found
    assert machine.fetch("org/base", HF_ENDPOINT="http://127.0.0.1:9") == found, "a Hub that cannot be reached"
    missing = machine.fetch("org/other", HF_HUB_OFFLINE="1")
    assert missing["code"] == 3
    assert "there is no local org/other" in missing["error"]


def test_downloads_a_revision(hub: FakeHub, machine: Machine) -> None:
    first = hub.add_repo("org/base", REPO)
    second = hub.push("org/base", {"config.json": b'{"model_type": "other"}'})
    assert machine.fetch("org/base")["revision"] == second
    for revision in (first, first[:12]):
        found = machine.fetch("org/base", revision)
        assert found["revision"] == first
        assert (Path(found["path"]) / "config.json").read_bytes() == REPO["config.json"]
    assert "no-such" in str(machine.fetch("org/base", "no-such"))


def test_resolves_a_branch_once(hub: FakeHub, machine: Machine) -> None:
    """The branch moves after the listing: the files are those of the commit of the listing."""
    first = hub.add_repo("org/base", REPO)
    asked = []
    respond = hub.take_fault

    def move(method: str, path: str, kinds: tuple[str, ...]) -> Any:
        if path.startswith("/api/models/") and "status" in kinds:
            asked.append(path)
            if len(asked) == 2:
                hub.push("org/base", {"model.safetensors": b"n" * 4000})
        return respond(method, path, kinds)

    hub.take_fault = move
    found = machine.fetch("org/base", "main")
    assert len(asked) >= 2
    assert found["revision"] == first
    assert found["files"]["model.safetensors"] == 3000


def test_downloads_shards_and_allowed_pickles(hub: FakeHub, machine: Machine) -> None:
    shards = {f"model-{at:05d}-of-00002.safetensors": b"s" * 100 for at in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    hub.add_repo("org/sharded", {**shards, **index, "consolidated.safetensors": b"c" * 100})
    assert machine.fetch("org/sharded")["files"].keys() == {*shards, *index}
    hub.add_repo("org/old", {"pytorch_model.bin": b"p" * 100, "config.json": b"{}", "training_args.bin": b"x" * 9})
    refused = machine.fetch("org/old")
    assert "org/old holds no safetensors weights (it holds: pytorch_model.bin" in refused["error"]
    assert machine.downloaded == set()
    assert machine.fetch("org/old", pickled=True)["files"].keys() == {"pytorch_model.bin", "config.json"}
    hub.add_repo("org/adapter", {"adapter_model.safetensors": b"a" * 99, "adapter_config.json": b"{}", **REPO})
    whole = machine.fetch("org/old", stem="adapter_model")
    assert whole["error"] == "org/old is a whole model, not an adapter" and "'models'" in whole["hint"]
    found = machine.fetch("org/adapter", stem="adapter_model")["files"].keys()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= found
    assert "model.safetensors" not in found


def test_reports_missing_repos_and_files(hub: FakeHub, machine: Machine, tmp_path: Path) -> None:
    hub.add_repo("org/empty", {"README.md": b"x"})
    hub.add_repo("org/closed", REPO, private=True)
    for path, message in (
        ("org/unknown", "there is no local org/unknown, and the Hub says: "),
        ("unknown", "there is no local unknown"),
        ("org/bad--name", "there is no local org/bad--name"),
        ("org/empty", "holds no safetensors weights (it holds: no weights)"),
        ("./missing/folder", "there is no ./missing/folder"),
        ("a/b/c", "there is no a/b/c"),
        ("~nobody-of-that-name/x", "there is no ~nobody"),
        ("x" * 5000 + "/", "there is no xxx"),
    ):
        found = machine.fetch(path)
        assert message in found["error"], found
        assert found["code"] == 3
        assert found["hint"] or path == "org/empty"
    closed = machine.fetch("org/closed", HF_TOKEN="hf_wrong")
    assert "hf auth login" in closed["hint"]
    assert "hf_wrong" not in str(closed)
    with pytest.raises(SourceError, match="has no revision 'v1'"):
        fetch(str(tmp_path), "v1", ("model",))


def test_reports_a_broken_connection_and_resumes(hub: FakeHub, machine: Machine) -> None:
    hub.add_repo("org/base", REPO)
    hub.fault(path=r"/api/models/", kind="drop", times=20)
    assert machine.fetch("org/base")["code"] == 3
    hub.faults.clear()
    hub.fault(path=r"/cdn/", kind="drop", times=20, after=1000)
    broken = machine.fetch("org/base")
    hub.faults.clear()
    assert broken.get("code") == 3 or "model.safetensors" not in broken["files"]
    assert machine.fetch("org/base")["files"]["model.safetensors"] == 3000


def test_merges_from_the_hub(hub: FakeHub, machine: Machine, models: Path, tmp_path: Path) -> None:
    for name, folder in (("org/base", "base"), ("org/tuned", "tuned-a"), ("me/loan", "adapters/loan")):
        hub.add_repo(name, {path.name: path.read_bytes() for path in (models / folder).iterdir()})
    sha = hub.repos[("model", "org/tuned")].refs["main"]
    code = """
import sys, mergeforge
parts = [{"model": name, "parameters": {"weight": 0.5}} for name in sys.argv[2:]]
mergeforge.merge({"merge_method": "linear", "models": parts}, out=sys.argv[1])
"""
    done = machine.run(code, str(tmp_path / "out"), "org/base+me/loan", f"org/tuned@{sha}")
    assert done.returncode == 0, done.stderr
    local = f"{models}/base+{models}/adapters/loan", f"{models}/tuned-a"
    done = machine.run(code, str(tmp_path / "local"), *local)
    assert done.returncode == 0, done.stderr
    merged, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "local"))
    assert merged == expected
    receipt = json.loads((tmp_path / "out" / "mergeforge.json").read_text())
    assert sha in [entry["revision"] for entry in receipt["inputs"]]
    assert all(entry["revision"] for entry in receipt["inputs"])
    assert "hf_faketoken" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("names", "stems", "pickled", "needed"),
    [
        (["model.safetensors", "pytorch_model.bin"], ("model",), True, ["model.safetensors"]),
        (
            ["pytorch_model.bin", "tokenizer_config.json"],
            ("model",),
            True,
            ["pytorch_model.bin", "tokenizer_config.json"],
        ),
        (["xmodel.safetensors", "model.safetensors"], ("model",), False, ["model.safetensors"]),
        (["adapter_model.bin"], ("adapter_model",), True, ["adapter_model.bin"]),
        (
            ["part-a.safetensors", "model.safetensors.index.json"],
            ("model",),
            False,
            ["model.safetensors.index.json", "part-a.safetensors"],
        ),
        (["unet.safetensors", "model.onnx"], ("model",), False, ["unet.safetensors"]),
        (
            ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"],
            ("model",),
            False,
            ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"],
        ),
    ],
)
def test_needed_files(names: list[str], stems: tuple[str, ...], pickled: bool, needed: list[str]) -> None:
    assert needed_files(names, stems, pickled) == needed


@pytest.mark.parametrize("times", [1, 2])
def test_detects_a_flipped_byte(hub: FakeHub, machine: Machine, times: int) -> None:
    """It is found by the sha256 and downloaded again; twice is an error, and nothing damaged stays in the cache."""
    hub.add_repo("org/base", REPO)
    hub.fault(path=hashlib.sha256(REPO["model.safetensors"]).hexdigest(), method="GET", kind="corrupt", times=times)
    found = machine.fetch("org/base")
    if times == 1:
        assert (Path(found["path"]) / "model.safetensors").read_bytes() == REPO["model.safetensors"]
    else:
        assert found["code"] == 3 and "came damaged twice" in found["error"]
        assert machine.fetch("org/base")["files"].keys() == WANTED
