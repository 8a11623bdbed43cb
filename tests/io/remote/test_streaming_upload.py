"""mergeforge run --stream-to-hub: one shard at a time on disk, no partial state visible, nothing uploaded twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub
from support.hub_machine import SHARD, Machine, merge_of, weights

from mergeforge.planner import make_plan

REPO = "fake/merged"
EAGER = "from mergeforge.execute import executor as e, streaming_upload as u; e.SYNC_SECONDS = 0.0; u.WAITS = ()"
BESIDE = {"README.md", "config.json", "generation_config.json", "mergeforge.json", "mergeforge.yml"}
BESIDE |= {"model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def local(machine: Machine, inputs: Path) -> str:
    """A recipe: the merge with local inputs."""
    return machine.recipe("local", **merge_of(*(str(inputs / name) for name in ("base", "tuned", "loan"))))


def stream_command(recipe: str, out: Path, *options: str) -> list[str]:
    return ["run", recipe, "--stream-to-hub", REPO, "--out", str(out), "-q", *options]


def repo_names(hub: FakeHub) -> set[str]:
    return {name for name in hub.listing(REPO) if name != ".gitattributes"}


def upload_count(hub: FakeHub) -> int:
    return sum(request["method"] == "PUT" for request in hub.log)


def assert_published(hub: FakeHub, out: Path, expected: dict[str, bytes]) -> None:
    """The repo holds the merge and nothing else; only the files next to the weights are local."""
    assert repo_names(hub) == {*expected, *BESIDE}
    assert all(hub.read(REPO, name) == data for name, data in expected.items())
    assert {path.name for path in out.iterdir()} == BESIDE
    assert all(hub.read(REPO, name) == (out / name).read_bytes() for name in BESIDE)
    assert set(hub.repos["model", REPO].refs) == {"main"}, "the staging branch is deleted"


def on_request(hub: FakeHub, act: Callable[[str, str], None]) -> None:
    """Call act(method, path) before each response."""
    original = hub.take_fault

    def take(method: str, path: str, kinds: tuple[str, ...]) -> Any:
        if "status" in kinds:
            act(method, path)
        return original(method, path, kinds)

    hub.take_fault = take  # type: ignore[method-assign]


def test_streams_inputs_and_output(
    machine: Machine, hub: FakeHub, recipe: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The same bytes; a private repo; at most 1.2 shards on disk; verify checks remote files in the repo."""
    out, disk_usage = tmp_path / "out", [0]

    def measure(method: str, path: str) -> None:
        disk_usage.append(sum(file.stat().st_blocks * 512 for file in out.rglob("*") if file.is_file()))

    on_request(hub, measure)
    done = machine.run(stream_command(recipe, out, "--stream-inputs"), ["verify", str(out), "--deep"])
    assert done.codes == [0, 0], done.err
    assert_published(hub, out, expected)
    assert hub.repos["model", REPO].private
    assert len(expected) == 4 and 0.9 * SHARD < max(disk_usage) < 1.2 * SHARD
    hub.push(REPO, {"model-00002-of-00004.safetensors": b"another"})
    done = machine.run(["verify", str(out)])
    assert (
        done.codes != [0] and "model-00002-of-00004.safetensors of fake/merged is not the file" in done.out + done.err
    )


FAULTS: list[dict[str, Any]] = [
    {"path": "/api/repos/create", "kind": "status", "code": 500},
    {"path": "/branch/", "method": "POST", "kind": "status", "code": 500},
    {"path": "/preupload/", "kind": "status", "code": 400},
    {"path": "/info/lfs/objects/batch", "kind": "status", "code": 400},
    {"path": "/lfs", "method": "PUT", "kind": "status", "code": 403},
    {"path": "/commit/mergeforge-", "method": "POST", "kind": "lost_response"},
    {"path": "/commit/mergeforge-", "method": "POST", "kind": "status", "code": 403},
    {"path": "/paths-info/", "kind": "status", "code": 400},
    {"path": "/commit/main", "method": "POST", "kind": "status", "code": 403},
    {"path": "/commit/main", "method": "POST", "kind": "lost_response"},
]


def test_survives_a_fault_at_every_step(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Each run fails at one fault, until one succeeds: main shows nothing, then all. No shard is uploaded twice."""
    seen = set()
    on_request(hub, lambda method, path: seen.add(frozenset(repo_names(hub)) if ("model", REPO) in hub.repos else ()))
    for fault in FAULTS:
        hub.fault(**fault)
    done = machine.run(*[stream_command(local, tmp_path / "out")] * (len(FAULTS) + 1), setup=EAGER)
    success = done.codes.index(0)
    assert success >= 7 and set(done.codes[:success]) <= {1, 5} and set(done.codes[success + 1 :]) <= {5}, done.err
    assert all(fault["times"] == 0 for fault in hub.faults), "every fault occurred"
    assert seen <= {(), frozenset(), frozenset({*expected, *BESIDE})}
    assert upload_count(hub) == len(expected) + 1, "plus the one that was refused"
    assert_published(hub, tmp_path / "out", expected)


def test_resumes_after_a_kill_and_uploads_only_missing_files(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, commits = tmp_path / "out", []
    process = machine.start(stream_command(local, out), setup=EAGER)

    def kill(method: str, path: str) -> None:
        commits.extend([path] if "/commit/mergeforge-" in path else [])
        if len(commits) == 3:
            process.send_signal(signal.SIGKILL)

    original = hub.take_fault
    on_request(hub, kill)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    hub.take_fault = original  # type: ignore[method-assign]
    first = upload_count(hub)
    assert repo_names(hub) == set() and len(weights(out / ".mergeforge")) == 1
    done = machine.run(stream_command(local, out))
    assert done.codes == [0], done.err
    assert_published(hub, out, expected)
    assert first == 3 and upload_count(hub) <= 2


def test_recreates_files_that_are_missing_on_the_hub(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The last commit fails; then somebody deletes the staging branch."""
    hub.fault(path="/commit/main", method="POST", kind="status", code=403)

    def remove(method: str, path: str) -> None:
        if "/whoami" in path and hub.faults and not hub.faults[0]["times"]:
            hub.faults.clear()
            refs = hub.repos["model", REPO].refs
            hub.repos["model", REPO].refs = {"main": refs["main"]}

    on_request(hub, remove)
    done = machine.run(stream_command(local, tmp_path / "out"), stream_command(local, tmp_path / "out"), setup=EAGER)
    assert done.codes == [1, 0], done.err
    assert_published(hub, tmp_path / "out", expected)


def test_detects_a_concurrent_commit(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """It is detected at the end and not overwritten; shards of an earlier publish are deleted."""
    hub.add_repo(REPO, {"README.md": b"old", "notes.md": b"mine", "model-00001-of-00009.safetensors": b"old"})

    def move(method: str, path: str) -> None:
        if "/commit/mergeforge-" in path and hub.read(REPO, "README.md") == b"old":
            hub.push(REPO, {"README.md": b"theirs"})

    on_request(hub, move)
    done = machine.run(stream_command(local, tmp_path / "out"), stream_command(local, tmp_path / "out"))
    assert done.codes == [5, 0], done.err
    assert "changed by somebody else" in done.err
    assert repo_names(hub) == {*expected, *BESIDE, "notes.md"}
    assert not hub.repos["model", REPO].private, "as it was"


def test_starts_nothing_without_a_token(machine: Machine, hub: FakeHub, local: str, tmp_path: Path) -> None:
    done = machine.run(stream_command(local, tmp_path / "out"), HF_TOKEN="")
    assert done.codes == [1] and "there is no Hub token" in done.err
    assert not (tmp_path / "out").exists() and ("model", REPO) not in hub.repos


def test_uploads_gguf_and_fp8_files_when_finished(machine: Machine, hub: FakeHub, inputs: Path, tmp_path: Path) -> None:
    """The GGUF file is open until the end; FP8 scales may be in another file than their codes."""
    recipe = {"merge_method": "passthrough", "models": [str(inputs / "base")]}
    output = {"name": "merged", "gguf": ["f16"], "fp8": True, "shard_size": 3_000_000}
    streamed = machine.recipe("gguf", **recipe, output=output | {"publish": {"repo": REPO, "stream": True}})
    plain = machine.recipe("plain", **recipe, output=output)
    streamed_out, plain_out = tmp_path / "streamed", tmp_path / "plain"
    done = machine.run(
        ["run", streamed, "--out", str(streamed_out), "-q"], ["run", plain, "--out", str(plain_out), "-q"]
    )
    assert done.codes == [0, 0], done.err
    files = [path.name for path in plain_out.iterdir() if path.suffix in (".gguf", ".safetensors")]
    assert len(files) > 3 and "merged-F16.gguf" in files
    assert all(hub.read(REPO, name) == (plain_out / name).read_bytes() for name in files)
    assert not [path for path in streamed_out.iterdir() if path.suffix in (".gguf", ".safetensors")]


def test_batches_hold_every_tensor_once_and_close_every_file(inputs: Path, tmp_path: Path) -> None:
    publish = {"repo": REPO, "stream": True}
    output = {"shard_size": 2_000_000, "gguf": ["q8_0"], "fp8": True, "publish": publish}
    recipe = {"merge_method": "passthrough", "models": [str(inputs / "base")], "output": output}
    plan = make_plan(recipe, out=tmp_path / "out")
    names = [tensor_plan.info.name for batch in plan.batches for tensor_plan in batch.tensor_plans]
    assert sorted(names) == sorted(tensor_plan.info.name for tensor_plan in plan.tensor_plans)
    finished = [name for batch in plan.batches for name in batch.finished]
    assert sorted(finished) == sorted(plan.files)
    for index, batch in enumerate(plan.batches):
        written = {encoder.file for tensor_plan in batch.tensor_plans for encoder in tensor_plan.encoders}
        closed = {name for earlier in plan.batches[:index] for name in earlier.finished}
        assert written <= set(batch.files) and not written & closed
    assert plan.disk < plan.nbytes_written
