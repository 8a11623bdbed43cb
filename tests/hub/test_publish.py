"""mergeforge publish to a fake Hub: what is uploaded, what stays as it is, and faults at every step."""

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
from mergeforge.execute import executor
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model
from mergeforge.planner import make_plan

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
    """Runs mergeforge commands in a process that uses the fake Hub."""

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
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    @property
    def put(self) -> int:
        """The number of large files that the last run uploaded."""
        return sum(request["method"] == "PUT" for request in self.hub.log)


@pytest.fixture
def publish(hub: FakeHub, tmp_path: Path) -> Publisher:
    return Publisher(hub, tmp_path / "home")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_publishes_everything_to_a_private_repo(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    done = publish("publish", str(merged), REPO)
    assert done.returncode == 0, done.stderr
    published = [name for name in hub.listing(REPO) if name != ".gitattributes"]
    assert published == names(merged)
    assert all(hub.read(REPO, name) == (merged / name).read_bytes() for name in published)
    assert hub.repos[("model", REPO)].private
    assert len(hub.repos[("model", REPO)].commits) <= 2, "one commit, after the empty one that creates the repo"


def test_a_second_publish_uploads_nothing(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    publish.json(merged)
    commits = len(hub.repos[("model", REPO)].commits)
    again = publish.json(merged)
    assert (again["sent"], again["removed"], again["commit"]) == ([], [], None)
    assert publish.put == 0 and len(hub.repos[("model", REPO)].commits) == commits


def test_a_dry_run_uploads_nothing(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    report = publish.json(merged, "--dry-run")
    assert set(report["sent"]) == set(names(merged)) and ("model", REPO) not in hub.repos
    output = publish("publish", str(merged), REPO, "--dry-run").stdout
    assert "would upload model-00001-of-0000" in output


def test_a_dry_run_needs_no_token(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    """Everything would be uploaded to a new repo; publishing still asks for the token."""
    done = publish("publish", str(merged), REPO, "--dry-run", "--json", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["sent"]) == set(names(merged)) and not publish.put
    assert publish("publish", str(merged), REPO, HF_TOKEN="").returncode == 1
    assert publish("publish", str(merged), "no-owner", "--dry-run", HF_TOKEN="").returncode == 2


def test_deletes_leftovers_of_an_earlier_publish(
    hub: FakeHub, publish: Publisher, merged: Path, tmp_path: Path
) -> None:
    """Shards of another layout would be read instead of the new ones; an unrelated file stays."""
    publish.json(merged)
    hub.push(REPO, {"notes.md": b"mine"})
    base = json.loads((merged / "mergeforge.json").read_text())["inputs"][0]["name"]
    unsharded = mergeforge.merge({"merge_method": "passthrough", "models": [base]}, out=tmp_path / "one")
    report = publish.json(unsharded)
    assert "model.safetensors.index.json" in report["removed"] and len(report["removed"]) >= 3
    published = [name for name in hub.listing(REPO) if name not in (".gitattributes", "notes.md")]
    assert published == names(unsharded) and "notes.md" in hub.listing(REPO)


FAULTS: list[dict[str, Any]] = [
    {"path": "/api/repos/create", "kind": "status", "code": 500, "times": 9},
    {"path": "/preupload/", "kind": "status", "code": 400, "times": 9},
    {"path": "/info/lfs/objects/batch", "kind": "status", "code": 400, "times": 9},
    {"path": "/lfs", "method": "PUT", "kind": "status", "code": 403, "times": 9},
    {"path": "/commit/", "method": "POST", "kind": "status", "code": 500, "times": 9},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['path'].strip('/')} {fault['kind']}")
def test_survives_a_fault_at_every_step(hub: FakeHub, publish: Publisher, merged: Path, fault: dict[str, Any]) -> None:
    """Nothing of an interrupted publish is visible; the next one uploads what is missing."""
    hub.fault(**fault)
    broken = publish("publish", str(merged), REPO)
    assert broken.returncode != 0 and "Traceback" not in broken.stderr, broken.stderr
    repo = hub.repos.get(("model", REPO))
    assert repo is None or [name for name in hub.listing(REPO) if name != ".gitattributes"] == []
    hub.faults.clear()
    publish.json(merged)
    assert [name for name in hub.listing(REPO) if name != ".gitattributes"] == names(merged)


def test_does_not_upload_files_twice(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    """A publish that failed at its commit has left the weights on the Hub."""
    hub.fault(path="/commit/", method="POST", kind="status", code=500, times=9)
    assert publish("publish", str(merged), REPO).returncode != 0
    assert publish.put > 0
    hub.faults.clear()
    publish.json(merged)
    assert publish.put == 0


def test_detects_a_concurrent_commit(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    """The repo changes between the comparison and the commit: nothing is overwritten."""
    hub.add_repo(REPO, {"README.md": b"old"})
    original = hub.take_fault

    def move(method: str, path: str, kinds: tuple[str, ...]) -> Any:
        if "/commit/" in path and method == "POST" and "status" in kinds:
            hub.push(REPO, {"README.md": b"theirs"})
        return original(method, path, kinds)

    hub.take_fault = move
    done = publish("publish", str(merged), REPO)
    assert done.returncode == 5 and "changed by somebody else" in done.stderr
    assert hub.read(REPO, "README.md") == b"theirs"
    hub.take_fault = original
    assert publish("publish", str(merged), REPO).returncode == 0


def test_reports_a_missing_and_a_wrong_token(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    missing = publish("publish", str(merged), REPO, HF_TOKEN="")
    assert missing.returncode == 1 and "there is no Hub token" in missing.stderr
    wrong = publish("publish", str(merged), REPO, HF_TOKEN="hf_wrong")
    assert wrong.returncode == 1 and "hf_wrong" not in wrong.stderr + wrong.stdout
    assert publish("publish", str(merged), "no-owner").returncode == 2


def test_refuses_an_unfinished_folder(publish: Publisher, tmp_path: Path) -> None:
    (tmp_path / "half" / ".mergeforge").mkdir(parents=True)
    assert "is not finished" in publish("publish", str(tmp_path / "half"), REPO).stderr
    assert publish("publish", str(tmp_path / "nothing"), REPO).returncode == 3


def test_a_recipe_publishes_and_checks_the_token_first(
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


def test_the_token_appears_nowhere(hub: FakeHub, publish: Publisher, merged: Path) -> None:
    done = publish("publish", str(merged), REPO)
    texts = [done.stdout, done.stderr, *(hub.read(REPO, name).decode(errors="replace") for name in hub.listing(REPO))]
    assert hub.token and not any(hub.token in text for text in texts)


def test_doctor_does_not_show_the_token(publish: Publisher) -> None:
    done = publish("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hub"].endswith("logged in")
    assert publish.hub.token not in done.stdout


def test_the_model_card_shows_how_to_use_the_model(merged: Path, tmp_path: Path) -> None:
    output = {"publish": "me/joined", "gguf": ["q8_0"]}
    recipe = {"base_model": str(merged.parent / "base"), "adapters": [str(merged.parent / "legal")], "output": output}
    card = (executor.run_plan(make_plan(recipe, out=tmp_path / "out")) / "README.md").read_text()
    for line in ('from_pretrained("me/joined"', "vllm serve me/joined", "ollama run hf.co/me/joined:Q8_0"):
        assert line in card


def test_publishes_gguf_files_to_their_own_repo(hub: FakeHub, publish: Publisher, merged: Path, tmp_path: Path) -> None:
    """Both repos match their receipts; the GGUF of an earlier publish is deleted from the model's repo."""
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
    assert again.count("0 B to upload") == 2


def test_refuses_to_split_a_folder_without_gguf_files(publish: Publisher, merged: Path) -> None:
    done = publish("publish", str(merged), REPO, "--gguf", "apart")
    assert done.returncode == 3 and "does not hold both safetensors and GGUF files" in done.stderr
