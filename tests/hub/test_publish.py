"""mergeforge publish against a Hub on the loopback: what is sent, what is left alone, and faults at every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub

import mergeforge
from mergeforge.cli import run_command
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

REPO = "fake/merged"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge in three shards."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "base", SHAPES["tiny"], seed=0)
    write_adapter(folder / "legal", SHAPES["tiny"], str(folder / "base"), rank=2, seed=1)
    recipe: dict[str, Any] = {"base_model": str(folder / "base"), "adapters": [str(folder / "legal")]}
    return mergeforge.merge(recipe | {"output": {"shard_size": 200_000}}, out=folder / "merged")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


class Publisher:
    """mergeforge publish in a process that sees the Hub."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        self.hub = hub
        keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.env = {**keep, **hub.env(), "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.hub.log.clear()
        command = [sys.executable, "-m", "mergeforge", *arguments]
        return subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=200)

    def json(self, folder: Path, *options: str) -> dict[str, Any]:
        done = self("publish", str(folder), REPO, "--json", *options)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @property
    def put(self) -> int:
        """Large files that the last run sent."""
        return sum(one["method"] == "PUT" for one in self.hub.log)


@pytest.fixture
def publish(hub: FakeHub, tmp_path: Path) -> Publisher:
    return Publisher(hub, tmp_path / "home")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_everything_is_there_and_private(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    done = publish("publish", str(merged), REPO)
    assert done.returncode == 0, done.stderr
    held = [name for name in hub.listing(REPO) if name != ".gitattributes"]
    assert held == names(merged)
    assert all(hub.read(REPO, name) == (merged / name).read_bytes() for name in held)
    assert hub.repos[("model", REPO)].private
    assert len(hub.repos[("model", REPO)].commits) <= 2, "one commit, after the empty one that makes a repo"


def test_a_second_time_nothing_is_sent(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    publish.json(merged)
    commits = len(hub.repos[("model", REPO)].commits)
    again = publish.json(merged)
    assert (again["sent"], again["removed"], again["commit"]) == ([], [], None)
    assert publish.put == 0 and len(hub.repos[("model", REPO)].commits) == commits


def test_a_dry_run_sends_nothing(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    found = publish.json(merged, "--dry-run")
    assert set(found["sent"]) == set(names(merged)) and ("model", REPO) not in hub.repos
    told = publish("publish", str(merged), REPO, "--dry-run").stdout
    assert "would send model-00001-of-0000" in told


def test_what_an_earlier_publish_left_is_removed(
    hub: FakeHub, publish: Publisher, merged: Path, tmp_path: Path
) -> None:
    """Shards of another layout would be read in place of the new ones; a file of somebody else stays."""
    publish.json(merged)
    hub.push(REPO, {"notes.md": b"mine"})
    base = json.loads((merged / "mergeforge.json").read_text())["inputs"][0]["name"]
    one = mergeforge.merge({"merge_method": "passthrough", "models": [base]}, out=tmp_path / "one")
    found = publish.json(one)
    assert "model.safetensors.index.json" in found["removed"] and len(found["removed"]) >= 3
    held = [name for name in hub.listing(REPO) if name not in (".gitattributes", "notes.md")]
    assert held == names(one) and "notes.md" in hub.listing(REPO)


FAULTS: list[dict[str, Any]] = [
    {"path": "/api/repos/create", "kind": "status", "code": 500, "times": 9},
    {"path": "/preupload/", "kind": "status", "code": 400, "times": 9},
    {"path": "/info/lfs/objects/batch", "kind": "status", "code": 400, "times": 9},
    {"path": "/lfs", "method": "PUT", "kind": "status", "code": 403, "times": 9},
    {"path": "/commit/", "method": "POST", "kind": "status", "code": 500, "times": 9},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['path'].strip('/')} {fault['kind']}")
def test_a_fault_at_every_step(hub: FakeHub, publish: Publisher, merged: Path, fault: dict[str, Any]) -> None:
    """The repo shows nothing of a publish that broke off; the next one sends what is missing, and all is there."""
    hub.fault(**fault)
    broken = publish("publish", str(merged), REPO)
    assert broken.returncode != 0 and "Traceback" not in broken.stderr, broken.stderr
    repo = hub.repos.get(("model", REPO))
    assert repo is None or [name for name in hub.listing(REPO) if name != ".gitattributes"] == []
    hub.faults.clear()
    publish.json(merged)
    assert [name for name in hub.listing(REPO) if name != ".gitattributes"] == names(merged)


def test_sent_files_are_not_sent_again(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    """A publish that broke off at its commit has left the weights on the Hub."""
    hub.fault(path="/commit/", method="POST", kind="status", code=500, times=9)
    assert publish("publish", str(merged), REPO).returncode != 0
    assert publish.put > 0
    hub.faults.clear()
    publish.json(merged)
    assert publish.put == 0


def test_somebody_elses_commit_meanwhile(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    """Between the look at the repo and the commit it changes: nothing is overwritten unseen."""
    hub.add_repo(REPO, {"README.md": b"old"})
    taken = hub.take_fault

    def move(method: str, path: str, kinds: tuple[str, ...]) -> Any:
        if "/commit/" in path and method == "POST" and "status" in kinds:
            hub.push(REPO, {"README.md": b"theirs"})
        return taken(method, path, kinds)

    hub.take_fault = move
    done = publish("publish", str(merged), REPO)
    assert done.returncode == 5 and "changed by somebody else" in done.stderr
    assert hub.read(REPO, "README.md") == b"theirs"
    hub.take_fault = taken
    assert publish("publish", str(merged), REPO).returncode == 0


def test_no_token_and_a_wrong_one(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    none = publish("publish", str(merged), REPO, HF_TOKEN="")
    assert none.returncode == 1 and "there is no Hub token" in none.stderr
    wrong = publish("publish", str(merged), REPO, HF_TOKEN="hf_wrong")
    assert wrong.returncode == 1 and "hf_wrong" not in wrong.stderr + wrong.stdout
    assert publish("publish", str(merged), "no-owner").returncode == 2


def test_what_is_not_finished_is_not_published(publish: Publisher, tmp_path: Path) -> None:
    (tmp_path / "half" / ".mergeforge").mkdir(parents=True)
    assert "is not finished" in publish("publish", str(tmp_path / "half"), REPO).stderr
    assert publish("publish", str(tmp_path / "nothing"), REPO).returncode == 3


def test_a_recipe_publishes_and_the_token_is_asked_for_first(
    hub: FakeHub, publish: Publisher, merged: Path, tmp_path: Path
) -> None:
    base = json.loads((merged / "mergeforge.json").read_text())["inputs"][0]["name"]
    recipe = tmp_path / "recipe.yaml"
    out = tmp_path / "out"
    recipe.write_text(
        f"merge_method: passthrough\nmodels: [{base}]\noutput: {{path: {out}, publish: {{repo: {REPO}}}}}\n"
    )
    refused = publish("run", str(recipe), HF_TOKEN="")
    assert refused.returncode == 1 and not out.exists()
    assert publish("run", str(recipe)).returncode == 0
    assert [name for name in hub.listing(REPO) if name != ".gitattributes"] == names(out)


def test_no_token_anywhere(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    done = publish("publish", str(merged), REPO)
    texts = [done.stdout, done.stderr, *(hub.read(REPO, name).decode(errors="replace") for name in hub.listing(REPO))]
    assert hub.token and not any(hub.token in text for text in texts)


def test_doctor_tells_no_token(publish: Publisher) -> None:
    done = publish("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hub"].endswith("a token is there")
    assert publish.hub.token not in done.stdout


def test_the_card_says_how_to_use_it(merged: Path, tmp_path: Path) -> None:
    output = {"publish": "me/joined", "gguf": ["q8_0"]}
    recipe = {"base_model": str(merged.parent / "base"), "adapters": [str(merged.parent / "legal")], "output": output}
    card = (mergeforge.merge(recipe, out=tmp_path / "out") / "README.md").read_text()
    for line in ('from_pretrained("me/joined"', "vllm serve me/joined", "ollama run hf.co/me/joined:Q8_0"):
        assert line in card


def test_ggufs_in_a_repo_of_their_own(hub: FakeHub, publish: Publisher, merged: Path, tmp_path: Path) -> None:
    """Both repos hold what their receipts say; published whole before, the model's repo loses the GGUF."""
    recipe = {"base_model": str(merged.parent / "base"), "adapters": [str(merged.parent / "legal")]}
    out = mergeforge.merge(recipe | {"output": {"gguf": ["q8_0"]}}, out=tmp_path / "out")
    assert publish("publish", str(out), REPO).returncode == 0
    done = publish("publish", str(out), REPO, "--gguf", "apart")
    assert done.returncode == 0, done.stderr
    assert not [name for name in hub.listing(REPO) if name.endswith(".gguf") or name == "Modelfile"]
    apart = f"{REPO}-GGUF"
    assert "model.safetensors" not in hub.listing(apart) and "out-Q8_0.gguf" in hub.listing(apart)
    assert f"base_model:\n- {REPO}" in hub.read(apart, "README.md").decode()
    for repo in (REPO, apart):
        folder = tmp_path / repo.replace("/", "-")
        folder.mkdir()
        for name in hub.listing(repo):
            (folder / name).write_bytes(hub.read(repo, name))
        assert run_command(["verify", str(folder)]) == 0
    again = publish("publish", str(out), REPO, "--gguf", "apart").stderr
    assert again.count("0 B to send") == 2


def test_what_cannot_be_parted_is_told(publish: Publisher, merged: Path) -> None:
    done = publish("publish", str(merged), REPO, "--gguf", "apart")
    assert done.returncode == 3 and "does not hold both safetensors and GGUF files" in done.stderr
