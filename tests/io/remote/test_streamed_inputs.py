"""mergeforge run --stream-inputs: the same bytes as from local files; only rows and small files are fetched."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import yaml
from support.fake_hub import FakeHub
from support.hub_machine import Machine, merge_of, weights

EAGER = "from mergeforge.execute import executor; executor.SYNC_SECONDS = 0.0"


def sizes(inputs: Path, *names: str) -> int:
    return sum(path.stat().st_size for name in names for path in (inputs / name).glob("*.safetensors"))


def test_writes_the_same_bytes_as_from_local_files(
    machine: Machine, recipe: str, inputs: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = machine.run(["run", recipe, "--stream-inputs", "--out", str(out)])
    assert done.codes == [0], done.err
    assert weights(out) == expected
    assert machine.downloaded == []
    assert machine.fetched < 1.2 * sizes(inputs, "base", "tuned", "loan"), "every byte about once"
    assert not any(machine.hub.token.encode() in path.read_bytes() for path in out.iterdir())  # type: ignore[union-attr]
    receipt = json.loads((out / "mergeforge.json").read_text())
    commits = {entry["name"]: entry["revision"] for entry in receipt["inputs"]}
    assert commits == {name: machine.hub.repos["model", name].refs["main"] for name in commits}


def test_plan_fetches_only_headers_and_small_files(machine: Machine, hub: FakeHub, recipe: str) -> None:
    """Pickles are refused, because they cannot be read by ranges."""
    hub.add_repo("org/old", {"pytorch_model.bin": b"p" * 100, "config.json": b"{}"})
    old = machine.recipe("old", merge_method="passthrough", models=["org/old"])
    plans = [["plan", name, "--stream-inputs", "--allow-pickle", "--out", "out", "--json"] for name in (recipe, old)]
    done = machine.run(*plans)
    assert done.codes == [0, 3], done.err
    assert '"bytes_read": 39948544' in done.out
    assert machine.fetched < 2_500_000, "a chunk of each file"
    assert machine.downloaded == []
    assert "holds no safetensors weights (it holds: pytorch_model.bin" in done.err


def test_a_recipe_streams_all_inputs_or_single_hf_urls(
    machine: Machine, inputs: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    all_streamed = machine.recipe("every", **merge_of("org/base", "org/tuned", "org/loan"), stream_inputs=True)
    one_streamed = machine.recipe("one", **merge_of("org/base", "hf://org/tuned@main", "org/loan"))
    outs = tmp_path / "every-out", tmp_path / "one-out"
    done = machine.run(["run", all_streamed, "--out", str(outs[0])], ["run", one_streamed, "--out", str(outs[1])])
    assert done.codes == [0, 0], done.err
    assert {path.parent.parent.parent.name for path in machine.downloaded} == {"models--org--base", "models--org--loan"}
    assert weights(outs[0]) == weights(outs[1]) == expected
    assert "base_model:\n- org/base\n- org/tuned\n" in (outs[1] / "README.md").read_text()


def test_reads_cached_weights_from_the_cache(
    machine: Machine, recipe: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    streamed = ["run", recipe, "--stream-inputs", "--out", out]
    done = machine.run(["plan", recipe, "--out", "out"], streamed, ["verify", out, "--deep"])
    assert done.codes == [0, 0, 0] and machine.downloaded and machine.fetched == 0
    assert weights(tmp_path / "out") == expected


def test_does_not_fetch_unused_layers(machine: Machine, inputs: Path, tmp_path: Path) -> None:
    slices = [{"sources": [{"model": "org/tuned", "layer_range": [0, 1]}]}]
    recipe = machine.recipe("slices", merge_method="passthrough", slices=slices)
    done = machine.run(["run", recipe, "--stream-inputs", "--out", str(tmp_path / "out")])
    assert done.codes == [0], done.err
    assert machine.fetched < sizes(inputs, "tuned") / 2


STEPS: list[dict[str, Any]] = [
    {"path": "/api/models/", "kind": "drop"},
    {"path": "/tree/", "kind": "status", "code": 503},
    {"path": r"/resolve/.*safetensors", "method": "HEAD", "kind": "status", "code": 503},
    {"path": r"/resolve/.*safetensors", "method": "HEAD", "kind": "drop"},
    {"path": "/cdn/", "kind": "drop", "after": 100_000, "times": 5},
    {"path": "/cdn/", "kind": "short", "after": 1000, "times": 2},
    {"path": "/cdn/", "kind": "status", "code": 503, "headers": {"Retry-After": "0"}},
]


def test_survives_a_fault_at_every_step(
    machine: Machine, recipe: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """All faults at once: a run succeeds or reports an error, and a later one succeeds."""
    for fault in STEPS:
        machine.hub.fault(**fault)
    done = machine.run(*[["run", recipe, "--stream-inputs", "--out", str(tmp_path / "out"), "-q"]] * 4)
    assert 0 in done.codes and set(done.codes) <= {0, 3, 5}, done.err
    assert all(fault["times"] == 0 for fault in machine.hub.faults), "every fault occurred"
    assert weights(tmp_path / "out") == expected


def test_a_changed_file_is_an_error_and_nothing_is_written(machine: Machine, recipe: str, tmp_path: Path) -> None:
    machine.hub.fault(path="/cdn/", method="GET", kind="etag", times=1)
    machine.hub.faults[0]["times"] = 0
    original = machine.hub.take_fault

    def later(method: str, path: str, kinds: tuple[str, ...]) -> Any:
        if "/cdn/" in path and sum("/cdn/" in request["path"] for request in machine.hub.log) == 8:
            machine.hub.faults[0]["times"] = 1
        return original(method, path, kinds)

    machine.hub.take_fault = later  # type: ignore[method-assign]
    done = machine.run(["run", recipe, "--stream-inputs", "--out", str(tmp_path / "out")])
    assert done.codes == [3] and "changed while it was read" in done.err
    assert not weights(tmp_path / "out")


def test_a_moving_branch_does_not_matter(
    machine: Machine, recipe: str, expected: dict[str, bytes], inputs: Path, tmp_path: Path
) -> None:
    original, moved = machine.hub.take_fault, []

    def move(method: str, path: str, kinds: tuple[str, ...]) -> Any:
        if "/cdn/" in path and not moved:
            moved.append(machine.hub.push("org/base", {"model.safetensors": b"another"}))
        return original(method, path, kinds)

    machine.hub.take_fault = move  # type: ignore[method-assign]
    machine.hub.fault(path="/cdn/", kind="status", code=403, times=3)  # so that URLs are requested again
    done = machine.run(["run", recipe, "--stream-inputs", "--out", str(tmp_path / "out")])
    assert done.codes == [0], done.err
    assert moved and weights(tmp_path / "out") == expected


def test_resumes_after_a_kill_and_fetches_only_missing_rows(
    machine: Machine, recipe: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    command = ["run", recipe, "--stream-inputs", "--threads", "1", "--memory", "32MiB", "--out", str(tmp_path / "out")]
    journal = tmp_path / "out" / ".mergeforge" / "journal.jsonl"
    process = machine.start(command, setup=EAGER)
    while process.poll() is None and not (journal.exists() and journal.read_text().count('"tile"') >= 20):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not weights(tmp_path / "out")
    full_fetch = 2 * sum(len(data) for data in expected.values())
    done = machine.run(command, setup=EAGER)
    assert done.codes == [0], done.err
    assert weights(tmp_path / "out") == expected
    assert machine.fetched < 0.9 * full_fetch


def test_the_schema_has_the_keys() -> None:
    from mergeforge.recipe import json_schema

    schema = yaml.safe_dump(json_schema())
    assert "stream_inputs" in schema and "stream:" in schema
