"""mergeforge run --stream-to-hub: one shard at a time on the disk, nothing half seen, nothing sent twice."""

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
EAGER = "from mergeforge import running, shipping; running.SYNC_SECONDS = 0.0; shipping.WAITS = ()"
BESIDE = {"README.md", "config.json", "generation_config.json", "mergeforge.json", "mergeforge.yml"}
BESIDE |= {"model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def local(machine: Machine, inputs: Path) -> str:
    """The merge from files."""
    return machine.recipe("local", **merge_of(*(str(inputs / name) for name in ("base", "tuned", "loan"))))


def shipped(recipe: str, out: Path, *options: str) -> list[str]:
    return ["run", recipe, "--stream-to-hub", REPO, "--out", str(out), "-q", *options]


def held(hub: FakeHub) -> set[str]:
    return {name for name in hub.listing(REPO) if name != ".gitattributes"}


def sends(hub: FakeHub) -> int:
    return sum(one["method"] == "PUT" for one in hub.log)


def assert_all_there(hub: FakeHub, out: Path, expected: dict[str, bytes]) -> None:
    """The repo holds the merge and nothing else; here lies what is beside the weights."""
    assert held(hub) == {*expected, *BESIDE}
    assert all(hub.read(REPO, name) == data for name, data in expected.items())
    assert {path.name for path in out.iterdir()} == BESIDE
    assert all(hub.read(REPO, name) == (out / name).read_bytes() for name in BESIDE)
    assert set(hub.repos["model", REPO].refs) == {"main"}, "the gathering branch is gone"


def on_request(hub: FakeHub, act: Callable[[str, str], None]) -> None:
    """Call act(method, path) before each answer."""
    asked = hub.take_fault

    def take(method: str, path: str, kinds: tuple[str, ...]) -> Any:
        if "status" in kinds:
            act(method, path)
        return asked(method, path, kinds)

    hub.take_fault = take  # type: ignore[method-assign]


def test_both_ends_on_the_hub(
    machine: Machine, hub: FakeHub, recipe: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The same bytes, private, at most 1.2 shards here at any time; verify asks the repo for what is not here."""
    out, lay = tmp_path / "out", [0]

    def look(method: str, path: str) -> None:
        lay.append(sum(one.stat().st_blocks * 512 for one in out.rglob("*") if one.is_file()))

    on_request(hub, look)
    done = machine.run(shipped(recipe, out, "--stream-inputs"), ["verify", str(out), "--deep"])
    assert done.codes == [0, 0], done.err
    assert_all_there(hub, out, expected)
    assert hub.repos["model", REPO].private
    assert len(expected) == 4 and 0.9 * SHARD < max(lay) < 1.2 * SHARD
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


def test_a_fault_at_every_step(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Each run meets one and fails, until one ends well: main shows nothing, then all. No shard is sent twice."""
    seen = set()
    on_request(hub, lambda method, path: seen.add(frozenset(held(hub)) if ("model", REPO) in hub.repos else ()))
    for fault in FAULTS:
        hub.fault(**fault)
    done = machine.run(*[shipped(local, tmp_path / "out")] * (len(FAULTS) + 1), setup=EAGER)
    well = done.codes.index(0)
    assert well >= 7 and set(done.codes[:well]) <= {1, 5} and set(done.codes[well + 1 :]) <= {5}, done.err
    assert all(fault["times"] == 0 for fault in hub.faults), "every fault was met"
    assert seen <= {(), frozenset(), frozenset({*expected, *BESIDE})}
    assert sends(hub) == len(expected) + 1, "and the one that was refused"
    assert_all_there(hub, tmp_path / "out", expected)


def test_killed_it_sends_and_computes_what_is_missing(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, commits = tmp_path / "out", []
    process = machine.start(shipped(local, out), setup=EAGER)

    def kill(method: str, path: str) -> None:
        commits.extend([path] if "/commit/mergeforge-" in path else [])
        if len(commits) == 3:
            process.send_signal(signal.SIGKILL)

    asked = hub.take_fault
    on_request(hub, kill)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    hub.take_fault = asked  # type: ignore[method-assign]
    first = sends(hub)
    assert held(hub) == set() and len(weights(out / ".mergeforge")) == 1
    done = machine.run(shipped(local, out))
    assert done.codes == [0], done.err
    assert_all_there(hub, out, expected)
    assert first == 3 and sends(hub) <= 2


def test_what_is_gone_from_the_hub_is_made_again(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The last commit fails; then somebody removes the gathering branch."""
    hub.fault(path="/commit/main", method="POST", kind="status", code=403)

    def remove(method: str, path: str) -> None:
        if "/whoami" in path and hub.faults and not hub.faults[0]["times"]:
            hub.faults.clear()
            refs = hub.repos["model", REPO].refs
            hub.repos["model", REPO].refs = {"main": refs["main"]}

    on_request(hub, remove)
    done = machine.run(shipped(local, tmp_path / "out"), shipped(local, tmp_path / "out"), setup=EAGER)
    assert done.codes == [1, 0], done.err
    assert_all_there(hub, tmp_path / "out", expected)


def test_somebody_elses_commit_meanwhile(
    machine: Machine, hub: FakeHub, local: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Found at the end, nothing of theirs is overwritten unseen; shards of an earlier publish go away."""
    hub.add_repo(REPO, {"README.md": b"old", "notes.md": b"mine", "model-00001-of-00009.safetensors": b"old"})

    def move(method: str, path: str) -> None:
        if "/commit/mergeforge-" in path and hub.read(REPO, "README.md") == b"old":
            hub.push(REPO, {"README.md": b"theirs"})

    on_request(hub, move)
    done = machine.run(shipped(local, tmp_path / "out"), shipped(local, tmp_path / "out"))
    assert done.codes == [5, 0], done.err
    assert "changed by somebody else" in done.err
    assert held(hub) == {*expected, *BESIDE, "notes.md"}
    assert not hub.repos["model", REPO].private, "as it was"


def test_no_token_and_nothing_is_begun(machine: Machine, hub: FakeHub, local: str, tmp_path: Path) -> None:
    done = machine.run(shipped(local, tmp_path / "out"), HF_TOKEN="")
    assert done.codes == [1] and "there is no Hub token" in done.err
    assert not (tmp_path / "out").exists() and ("model", REPO) not in hub.repos


def test_gguf_and_fp8_are_sent_when_they_are_finished(
    machine: Machine, hub: FakeHub, inputs: Path, tmp_path: Path
) -> None:
    """The GGUF file is open until the end; FP8's scales need not lie in the file of their codes."""
    recipe = {"merge_method": "passthrough", "models": [str(inputs / "base")]}
    output = {"name": "merged", "gguf": ["f16"], "fp8": True, "shard_size": 3_000_000}
    streamed = machine.recipe("gguf", **recipe, output=output | {"publish": {"repo": REPO, "stream": True}})
    plain = machine.recipe("plain", **recipe, output=output)
    one, two = tmp_path / "streamed", tmp_path / "plain"
    done = machine.run(["run", streamed, "--out", str(one), "-q"], ["run", plain, "--out", str(two), "-q"])
    assert done.codes == [0, 0], done.err
    files = [path.name for path in two.iterdir() if path.suffix in (".gguf", ".safetensors")]
    assert len(files) > 3 and "merged-F16.gguf" in files
    assert all(hub.read(REPO, name) == (two / name).read_bytes() for name in files)
    assert not [path for path in one.iterdir() if path.suffix in (".gguf", ".safetensors")]


def test_batches_hold_every_piece_once_and_close_every_file(inputs: Path, tmp_path: Path) -> None:
    publish = {"repo": REPO, "stream": True}
    output = {"shard_size": 2_000_000, "gguf": ["q8_0"], "fp8": True, "publish": publish}
    recipe = {"merge_method": "passthrough", "models": [str(inputs / "base")], "output": output}
    plan = make_plan(recipe, out=tmp_path / "out")
    pieces = [piece.info.name for batch in plan.batches for piece in batch.tensor_plans]
    assert sorted(pieces) == sorted(piece.info.name for piece in plan.tensor_plans)
    finished = [name for batch in plan.batches for name in batch.finished]
    assert sorted(finished) == sorted(plan.files)
    for at, batch in enumerate(plan.batches):
        written = {outlet.file for piece in batch.tensor_plans for outlet in piece.encoders}
        closed = {name for earlier in plan.batches[:at] for name in earlier.finished}
        assert written <= set(batch.files) and not written & closed
    assert plan.disk < plan.nbytes_written
