"""A disk that is full, slow to take bytes, or broken: a clear error, nothing half done, and the next run goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faults.breaking import Strikes, World, assert_nothing_half_done, digests, go_on
from support.faults.tally import Tally

from mergeforge.core.tensor_info import Tile
from mergeforge.errors import BudgetError, MergeforgeError, OutputError
from mergeforge.execute import executor
from mergeforge.execute.journal import JOURNAL_NAME, read_journal
from mergeforge.io.disk import sync_folder
from mergeforge.planner import WORK

Strike = Callable[..., Strikes]


def failing(code: int) -> Callable[..., Any]:
    def fail(original: Any, *arguments: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_at_every_write(
    world: World, out: Path, monkeypatch: pytest.MonkeyPatch, strike: Strike, code: int, tally: Tally
) -> None:
    reference, plan, number = world.reference(), world.plan(out), 1
    step = 1 if code == errno.ENOSPC else 13
    while True:
        with monkeypatch.context() as patch:
            strikes = strike(("pwrite", "write"), number, failing(code), lasting=True, patch=patch)
            try:
                executor.run_plan(plan)
                break
            except BudgetError as error:
                assert error.exit_code == 4
                assert "run the same command again" in error.hint
        with tally.run():
            assert strikes.struck
            assert_nothing_half_done(out, reference)
            executor.run_plan(plan)
            assert digests(out) == reference, f"full at write {number}"
        shutil.rmtree(out)
        number += step
    assert digests(out) == reference
    assert number > 20


@pytest.mark.usefixtures("eager")
def test_a_failing_fsync_is_fatal(
    world: World, out: Path, monkeypatch: pytest.MonkeyPatch, strike: Strike, tally: Tally
) -> None:
    """Linux reports a lost write once and then says that all is well: the second answer must not be believed."""
    reference, plan, number = world.reference(), world.plan(out), 1
    while True:
        with monkeypatch.context() as patch:
            strikes = strike(("fsync", "write"), number, failing(errno.EIO), patch=patch)
            try:
                executor.run_plan(plan)
                break
            except MergeforgeError as error:
                assert error.exit_code == 1
                assert "Input/output error" in str(error)
        with tally.run():
            if strikes.calls[number - 1] == "fsync":
                assert "write" not in strikes.calls[number:], "a tile was noted as done although its sync had failed"
            assert_nothing_half_done(out, reference)
            go_on(plan)
            assert digests(out) == reference, f"failed at call {number}"
        shutil.rmtree(out)
        number += 1
    assert number > 40


def test_short_writes_are_continued(world: World, out: Path, strike: Strike) -> None:
    def short(original: Any, fd: int, data: Any, *offset: int) -> Any:
        return original(fd, bytes(data)[:100], *offset)

    strikes = strike(("pwrite", "write"), 1, short, lasting=True)
    executor.run_plan(world.plan(out))
    assert digests(out) == world.reference()
    assert len(strikes.calls) > 200


def test_a_disk_that_is_too_small_is_refused_before_writing(
    world: World, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(world.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BudgetError, match=r"1\.0 KB free") as caught:
        executor.run_plan(world.plan(out))
    assert "--out DIR" in caught.value.command_hint
    assert not list(out.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "16k", "28k", "40k", "56k", "64k", "72k"])
def test_a_full_tmpfs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount")
    try:
        plan = world.plan(disk / "out")
        with pytest.raises(BudgetError):
            executor.run_plan(plan)
        monkeypatch.setattr(executor.Workspace.__module__ + ".check_disk", lambda plan: None)  # it fills up later
        with pytest.raises(BudgetError):
            executor.run_plan(plan)
        assert_nothing_half_done(disk / "out", world.reference())
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        executor.run_plan(plan)
        assert digests(disk / "out") == world.reference()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_unwritable_output_paths_are_refused(world: World, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place in (file, file / "below", tmp_path / "dangling", tmp_path / ("x" * 300), Path("/proc/mergeforge-test")):
        with pytest.raises(OutputError) as caught:
            executor.run_plan(world.plan(place))
        assert place.name[:40] in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_without_write_permission(world: World, out: Path, strike: Strike, code: int) -> None:
    strike(("mkdir",), 1, failing(code), lasting=True)
    with pytest.raises(OutputError, match="cannot be written"):
        executor.run_plan(world.plan(out))


def test_filesystems_that_cannot_sync_a_folder(tmp_path: Path, strike: Strike) -> None:
    strike(("fsync",), 1, failing(errno.EINVAL))
    sync_folder(tmp_path)


# --- what an interrupted run left behind


@pytest.fixture
def interrupted(world: World, out: Path, strike: Strike, eager: None) -> Path:
    """The work folder of a run that stopped after a few tiles."""
    with pytest.MonkeyPatch.context() as patch:
        strike(("fsync",), 30, failing(errno.EIO), patch=patch)
        with pytest.raises(MergeforgeError):
            executor.run_plan(world.plan(out))
    return out / WORK


def tiles_written(world: World, out: Path, strike: Strike) -> int:
    """Go on, and count the writes of tiles."""
    writes = []

    def note(original: Any, fd: int, data: Any, offset: int) -> Any:
        if opened(fd).endswith(".safetensors") and offset:
            writes.append(offset)
        return original(fd, data, offset)

    strike(("pwrite",), 1, note, lasting=True)
    executor.run_plan(world.plan(out))
    assert digests(out) == world.reference()
    return len(writes)


def opened(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def noted(folder: Path) -> dict[Tile, Any]:
    journal = read_journal(folder)
    assert journal is not None
    journal.close()
    return journal.done


def test_finished_tiles_are_not_recomputed(world: World, out: Path, interrupted: Path, strike: Strike) -> None:
    done, tiles = len(noted(interrupted)), sum(len(piece.tiles) for piece in world.plan(out).tensor_plans)
    assert 3 < done < tiles
    assert tiles_written(world, out, strike) == tiles - done


def test_a_torn_journal_is_used_up_to_its_last_complete_line(world: World, out: Path, interrupted: Path) -> None:
    whole = (interrupted / JOURNAL_NAME).read_bytes()
    before = len(noted(interrupted))
    for cut in (len(whole) - 1, len(whole) - 20, whole.rindex(b"\n", 0, -1) + 4):
        (interrupted / JOURNAL_NAME).write_bytes(whole[:cut])
        assert len(noted(interrupted)) == before - 1
        assert (interrupted / JOURNAL_NAME).read_bytes() == whole[: whole.rindex(b"\n", 0, -1) + 1]
    executor.run_plan(world.plan(out))
    assert digests(out) == world.reference()


def test_a_damaged_journal_line_is_ignored(world: World, out: Path, interrupted: Path) -> None:
    lines = (interrupted / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"tile"', b'"tilt"')
    (interrupted / JOURNAL_NAME).write_bytes(b"".join(lines))
    assert len(noted(interrupted)) == 1
    executor.run_plan(world.plan(out))
    assert digests(out) == world.reference()


@pytest.mark.parametrize("content", [b"", b"garbage\n", b"\x00" * 300])
def test_a_journal_without_a_first_line_is_discarded(
    world: World, out: Path, interrupted: Path, content: bytes
) -> None:
    (interrupted / JOURNAL_NAME).write_bytes(content)
    executor.run_plan(world.plan(out))
    assert digests(out) == world.reference()


def test_a_damaged_tile_is_found_and_recomputed(world: World, out: Path, interrupted: Path, strike: Strike) -> None:
    plan, done = world.plan(out), noted(interrupted)
    tile = next(iter(done))
    extent = plan.checkpoint.extents[tile.name]
    with open(interrupted / extent.file, "r+b") as file:
        file.seek(extent.offset)
        byte = file.read(1)
        file.seek(extent.offset)
        file.write(bytes([byte[0] ^ 1]))
    tiles = sum(len(piece.tiles) for piece in plan.tensor_plans)
    assert tiles_written(world, out, strike) == tiles - len(done) + 1


def test_a_rewritten_tile_is_synced(world: World, out: Path, strike: Strike, eager: None) -> None:
    """All tiles noted, one damaged: writing it again changes nothing in the journal, but must reach the disk."""
    plan = world.plan(out)
    stopped = executor.run_tiles(plan)
    tiles = [next(stopped) for _ in range(sum(len(piece.tiles) for piece in plan.tensor_plans))]
    stopped.close()
    assert len(noted(out / WORK)) == len(tiles)
    extent = plan.checkpoint.extents[tiles[0].name]
    with open(out / WORK / extent.file, "r+b") as file:
        file.seek(extent.offset)
        file.write(b"\xff\xff")
    events = []

    def note(original: Any, fd: int, *arguments: Any) -> Any:
        events.append((original.__name__, opened(fd)))
        return original(fd, *arguments)

    strike(("pwrite", "fsync"), 1, note, lasting=True)
    executor.run_plan(plan)
    assert digests(out) == world.reference()
    path = str(out / WORK / extent.file)
    assert events.index(("fsync", path)) > max(at for at, event in enumerate(events) if event == ("pwrite", path))


@pytest.mark.parametrize("nbytes", [0, 5, 100_000])
def test_staged_files_of_the_wrong_size(world: World, out: Path, interrupted: Path, nbytes: int) -> None:
    staged = next(interrupted.glob("*.safetensors"))
    os.truncate(staged, nbytes)
    executor.run_plan(world.plan(out))
    assert digests(out) == world.reference()
