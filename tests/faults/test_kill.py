"""Killed at any instant, the same command ends in the bytes of an undisturbed run (invariants I1, I2, I4)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from support.faults.breaking import World, assert_nothing_half_done, digests, go_on
from support.faults.tally import Tally
from support.faults.warm import DEAD, Warm

from mergeforge.errors import OutputError
from mergeforge.execute import executor


def killed_at(number: int, warm: Warm, command: list[str], *, eager: bool = False) -> bool:
    """Do the merge in a process that dies at its `number`-th change of the disk; False when it finished before."""
    ended = warm.run(command, dies_at=number, eager=eager)
    assert ended.code in (0, DEAD) or "already holds a finished merge" in ended.err, ended
    return ended.code == DEAD


@pytest.mark.usefixtures("eager")
def test_killed_at_every_change_of_the_disk(world: World, warm: Warm, out: Path, tally: Tally) -> None:
    reference, plan, number = world.reference(), world.plan(out), 1
    while killed_at(number, warm, world.command(out), eager=True):
        with tally.run():
            assert_nothing_half_done(out, reference)
            go_on(plan)
            assert digests(out) == reference, f"killed at change {number}"
        shutil.rmtree(out)
        number += 1
    assert digests(out) == reference
    assert number > 60


def test_killed_at_every_change_while_replacing_a_merge(
    world: World, warm: Warm, out: Path, tmp_path: Path, tally: Tally
) -> None:
    """Three shards and an index give way to one file: nothing stale is left, at whatever point it was killed."""
    old, new = world.reference("shards"), world.reference("single")
    kept = tmp_path / "kept"
    executor.run_plan(world.plan(out, "shards"))
    shutil.copytree(out, kept)
    plan, number = world.plan(out, "single"), 1
    while killed_at(number, warm, [*world.command(out, "single"), "--overwrite"]):
        with tally.run():
            assert_nothing_half_done(out, old, new)
            executor.run_plan(plan, overwrite=True)
            assert digests(out) == new, f"killed at change {number}"
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        number += 1
    assert digests(out) == new
    assert number > 30


def test_killed_while_resuming_after_a_kill(world: World, warm: Warm, out: Path, tally: Tally) -> None:
    reference, chance = world.reference(), random.Random(5)
    for _ in range(12):
        while killed_at(chance.randrange(1, 60), warm, world.command(out)):
            with tally.run():
                assert_nothing_half_done(out, reference)
        assert digests(out) == reference
        shutil.rmtree(out)


def test_files_of_an_unfinished_commit_are_removed_when_another_merge_starts_over(
    world: World, warm: Warm, out: Path
) -> None:
    number = 1
    while True:  # until a kill has left files under final names
        assert killed_at(number, warm, world.command(out))
        if any(path.name.startswith("model-") for path in out.glob("*.safetensors")):
            break
        shutil.rmtree(out, ignore_errors=True)
        number += 1
    with pytest.raises(OutputError, match="another merge") as caught:
        executor.run_plan(world.plan(out, "single"))
    assert "--fresh" in caught.value.command_hint
    executor.run_plan(world.plan(out, "single"), fresh=True)
    assert digests(out) == world.reference("single")
