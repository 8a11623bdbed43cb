"""What lies in OUT already, who else writes there, and what OUT must not be."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faults.breaking import RECEIPT, Strikes, World, digests, finished_files, merge_command

from mergeforge.errors import OutputError
from mergeforge.execute import executor
from mergeforge.execute.workspace import Workspace
from mergeforge.planner import WORK


@pytest.fixture
def finished(world: World, out: Path) -> Path:
    world.reference()
    executor.run_plan(world.plan(out))
    return out


def test_a_finished_merge_is_replaced_only_on_request(world: World, finished: Path) -> None:
    held = digests(finished)
    for kind in ("shards", "single"):
        for fresh in (False, True):
            with pytest.raises(OutputError, match="already holds a finished merge") as caught:
                executor.run_plan(world.plan(finished, kind), fresh=fresh)
            assert caught.value.exit_code == 5
            assert "--overwrite" in caught.value.command_hint
    assert digests(finished) == held
    executor.run_plan(world.plan(finished), overwrite=True)
    assert digests(finished) == held


def test_replacing_leaves_no_stale_files(world: World, finished: Path) -> None:
    (finished / "notes.txt").write_text("mine")
    executor.run_plan(world.plan(finished, "single"), overwrite=True)
    assert (finished / "notes.txt").read_text() == "mine"
    (finished / "notes.txt").unlink()
    assert digests(finished) == world.reference("single")
    executor.run_plan(world.plan(finished, "shards"), overwrite=True)
    assert digests(finished) == world.reference("shards")


def test_replacing_removes_only_files_inside_the_folder(world: World, finished: Path) -> None:
    """The receipt of a downloaded model is anyone's text."""
    outside = finished.parent / "precious"
    outside.write_text("x")
    receipt = json.loads((finished / RECEIPT).read_text())
    hostile = ["../precious", str(outside), "..", ".", "a/../../precious", f"{WORK}/lock", "sub/../../precious"]
    receipt["files"] |= {name: {"size": 1} for name in hostile}
    (finished / RECEIPT).write_text(json.dumps(receipt))
    executor.run_plan(world.plan(finished, "single"), overwrite=True)
    assert outside.read_text() == "x"
    assert digests(finished) == world.reference("single")


@pytest.mark.parametrize("files", [None, [], "x", {"model-00001-of-00003.safetensors": 3}])
def test_a_malformed_receipt(world: World, finished: Path, files: object) -> None:
    receipt = json.loads((finished / RECEIPT).read_text())
    (finished / RECEIPT).write_text(json.dumps({**receipt, "files": files}))
    executor.run_plan(world.plan(finished, "single"), overwrite=True)
    assert world.reference("single").items() <= digests(finished).items()


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors", "x.gguf", "config.json", "README.md"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_overwritten(world: World, out: Path, name: str, overwrite: bool) -> None:
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match="no merge of mergeforge wrote") as caught:
        executor.run_plan(world.plan(out), overwrite=overwrite, fresh=overwrite)
    assert name in str(caught.value)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


def test_other_foreign_files_are_kept(world: World, out: Path) -> None:
    out.mkdir()
    (out / ".gitattributes").write_text("mine")
    executor.run_plan(world.plan(out))
    assert (out / ".gitattributes").read_text() == "mine"
    assert world.reference().items() <= digests(out).items()


@pytest.fixture
def stopped(world: World, out: Path) -> Path:
    """OUT with an unfinished run of the merge into shards."""
    tiles = executor.run_tiles(world.plan(out, "shards"))
    next(tiles)
    tiles.close()
    return out


def test_an_unfinished_run_of_another_merge(world: World, stopped: Path) -> None:
    before = digests(stopped)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="interrupted run of another merge") as caught:
            executor.run_plan(world.plan(stopped, "single"), overwrite=overwrite)
        assert caught.value.exit_code == 5
        assert "--fresh" in caught.value.command_hint
    after = digests(stopped)
    assert {name for name in before if "lock" not in name} <= after.keys()
    executor.run_plan(world.plan(stopped, "single"), fresh=True)
    assert digests(stopped) == world.reference("single")


def test_a_changed_weight_makes_a_different_merge(world: World, stopped: Path) -> None:
    recipe = world.recipe("shards")
    recipe["adapters"][0]["weight"] = 0.25
    from mergeforge.planner import make_plan

    with pytest.raises(OutputError, match="another merge"):
        executor.run_plan(make_plan(recipe, out=stopped))


def test_memory_and_threads_may_change_between_runs(world: World, stopped: Path) -> None:
    executor.run_plan(world.plan(stopped, "shards", threads=2, memory="1GiB"))
    assert digests(stopped) == world.reference("shards")


def test_fresh_starts_the_same_merge_over(world: World, stopped: Path) -> None:
    (stopped / WORK / "leftover").mkdir()
    (stopped / WORK / "leftover" / "x").write_text("x")
    executor.run_plan(world.plan(stopped, "shards"), fresh=True)
    assert digests(stopped) == world.reference("shards")


def test_an_interrupted_replacement_needs_its_flag_again(world: World, finished: Path) -> None:
    tiles = executor.run_tiles(world.plan(finished, "single"), overwrite=True)
    next(tiles)
    tiles.close()
    with pytest.raises(OutputError, match="already holds a finished merge"):
        executor.run_plan(world.plan(finished, "single"))
    assert finished_files(finished) == world.reference("shards")
    executor.run_plan(world.plan(finished, "single"), overwrite=True)
    assert digests(finished) == world.reference("single")


def test_a_work_folder_that_is_a_link_is_not_followed(world: World, out: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "home"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    out.mkdir()
    (out / WORK).symlink_to(elsewhere)
    for fresh in (False, True):
        with pytest.raises(OutputError, match="is a link"):
            executor.run_plan(world.plan(out), fresh=fresh)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_links_at_staged_and_final_names_are_not_followed(world: World, out: Path, stopped: Path) -> None:
    victim = out.parent / "victim"
    victim.write_text("x")
    staged = next((out / WORK).glob("*.safetensors"))
    staged.unlink()
    staged.symlink_to(victim)
    with pytest.raises(OutputError, match="cannot be written"):
        executor.run_plan(world.plan(out))
    assert victim.read_text() == "x"
    staged.unlink()
    (out / staged.name).symlink_to(victim)
    executor.run_plan(world.plan(out))
    assert victim.read_text() == "x"
    assert digests(out) == world.reference()


# --- OUT and the inputs


@pytest.fixture
def inputs(world: World, tmp_path: Path) -> Iterator[Path]:
    """Copies of the inputs, which must stay as they are."""
    root = tmp_path / "inputs"
    shutil.copytree(world.root / "base", root / "base")
    shutil.copytree(world.root / "adapter", root / "adapter")
    before = digests(root)
    yield root
    assert digests(root) == before


def plan_of(inputs: Path, out: Path) -> None:
    from mergeforge.planner import make_plan

    recipe = {"base_model": str(inputs / "base"), "adapters": [str(inputs / "adapter")]}
    executor.run_plan(make_plan(recipe, out=out, threads=1), overwrite=True)


@pytest.mark.parametrize("place", ["base", "adapter", "base/merged", "adapter/deep/er", "base/../base", "x/../base"])
def test_an_input_is_never_the_output(inputs: Path, place: str) -> None:
    with pytest.raises(OutputError, match="the input") as caught:
        plan_of(inputs, inputs / place)
    assert caught.value.exit_code == 5


def test_a_link_to_an_input_is_never_the_output(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(inputs / "base")
    for place in ("link", "link/merged"):
        with pytest.raises(OutputError, match="the input"):
            plan_of(inputs, tmp_path / place)


def test_the_real_folder_of_a_linked_input_is_never_the_output(inputs: Path, tmp_path: Path, out: Path) -> None:
    out.mkdir()
    weights = inputs / "base" / "model.safetensors"
    (out / "model.safetensors").write_bytes(weights.read_bytes())
    linked = tmp_path / "linked"
    shutil.copytree(inputs, linked)
    (linked / "base" / "model.safetensors").unlink()
    (linked / "base" / "model.safetensors").symlink_to(out / "model.safetensors")
    (out / RECEIPT).write_text('{"tensors": {}, "files": {"model.safetensors": {}}}')
    with pytest.raises(OutputError, match="the input"):
        plan_of(linked, out)
    assert (out / "model.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.slow
def test_a_bind_mount_of_an_input_is_never_the_output(inputs: Path, tmp_path: Path) -> None:
    place = tmp_path / "bound"
    place.mkdir()
    if subprocess.run(["mount", "--bind", str(inputs / "base"), str(place)], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        with pytest.raises(OutputError, match="the input"):
            plan_of(inputs, place)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_an_output_beside_the_inputs_is_allowed(inputs: Path, world: World) -> None:
    plan_of(inputs, inputs.parent / "merged")
    plan_of(inputs, inputs.parent)


# --- two at once


def test_two_runs_at_once(world: World, out: Path) -> None:
    first = executor.run_tiles(world.plan(out))
    next(first)
    with pytest.raises(OutputError, match=f"another run writes to .*process {os.getpid()} on ") as caught:
        executor.run_plan(world.plan(out))
    assert caught.value.exit_code == 5
    for _ in first:
        pass
    assert digests(out) == world.reference()


def test_a_run_in_another_process(world: World, out: Path) -> None:
    code = f"""
import fcntl, os, sys
os.makedirs({str(out / WORK)!r})
fd = os.open({str(out / WORK / "lock")!r}, os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, f"process {{os.getpid()}} on here".encode())
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"process {holder.pid} on here"):
            executor.run_plan(world.plan(out))
        holder.stdin.close()
    executor.run_plan(world.plan(out))
    assert digests(out) == world.reference()


def test_waiting_for_a_run_that_removes_its_folder(world: World, out: Path, strike: Callable[..., Strikes]) -> None:
    """Between making the folder and opening the lock, the run that held it finishes."""

    def vanish(original: object, path: Path, *arguments: object, **named: object) -> int:
        shutil.rmtree(out / WORK)
        return os_open(path, *arguments, **named)  # type: ignore[operator,no-any-return]

    os_open = os.open
    plan = world.plan(out)
    strike(("open",), 1, vanish)
    workspace = Workspace(plan)
    workspace.close()
    assert (out / WORK / "lock").exists()


# --- modes


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(world: World, out: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        executor.run_plan(world.plan(out))
    finally:
        os.umask(before)
    for path in [out, *out.rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path.name


@pytest.mark.slow
def test_the_command_reports_conflicts(world: World, finished: Path, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(world.recipe()))
    done = subprocess.run(merge_command(tmp_path / "recipe.yaml", finished), capture_output=True, text=True)
    assert done.returncode == 5
    assert "--overwrite" in done.stderr
