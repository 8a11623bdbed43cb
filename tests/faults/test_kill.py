"""Killed at any instant, the same command ends in the bytes of an undisturbed run (invariants I1, I2, I4)."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breaking import CHANGING, Strikes, World, assert_nothing_half_done, digests, go_on
from tally import Tally

from mergeforge import running
from mergeforge.errors import OutputError
from mergeforge.planning import Plan

KILLED = 137


def die(original: Any, *arguments: Any, **named: Any) -> None:
    """End the process without a farewell; a write gets half of its bytes out first."""
    if original.__name__ in ("pwrite", "write"):
        fd, data, *rest = arguments
        original(fd, bytes(data)[: len(data) // 2], *rest)
    os._exit(KILLED)


def killed_at(plan: Plan, number: int, strike: Callable[..., Strikes], **options: Any) -> bool:
    """Do the merge in a fork that dies at its `number`-th change of the disk; False when it finished before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "fork with threads": none is running
        child = os.fork()
    if child == 0:
        strike(CHANGING, number, die)
        try:
            go_on(plan, **options)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


@pytest.mark.usefixtures("eager")
def test_killed_at_every_change_of_the_disk(
    world: World, out: Path, strike: Callable[..., Strikes], tally: Tally
) -> None:
    reference, plan, number = world.reference(), world.plan(out), 1
    while killed_at(plan, number, strike):
        with tally.run():
            assert_nothing_half_done(out, reference)
            go_on(plan)
            assert digests(out) == reference, f"killed at change {number}"
        shutil.rmtree(out)
        number += 1
    assert digests(out) == reference
    assert number > 60


def test_killed_at_every_change_while_replacing_a_merge(
    world: World, out: Path, strike: Callable[..., Strikes], tmp_path: Path, tally: Tally
) -> None:
    """Three shards and an index give way to one file: nothing stale is left, at whatever point it was killed."""
    old, new = world.reference("shards"), world.reference("single")
    kept = tmp_path / "kept"
    running.merge(world.plan(out, "shards"))
    shutil.copytree(out, kept)
    plan, number = world.plan(out, "single"), 1
    while killed_at(plan, number, strike, overwrite=True):
        with tally.run():
            assert_nothing_half_done(out, old, new)
            running.merge(plan, overwrite=True)
            assert digests(out) == new, f"killed at change {number}"
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        number += 1
    assert digests(out) == new
    assert number > 30


def test_killed_while_it_goes_on_after_a_kill(
    world: World, out: Path, strike: Callable[..., Strikes], tally: Tally
) -> None:
    reference, plan, chance = world.reference(), world.plan(out), random.Random(5)
    for _ in range(12):
        while killed_at(plan, chance.randrange(1, 60), strike):
            with tally.run():
                assert_nothing_half_done(out, reference)
        assert digests(out) == reference
        shutil.rmtree(out)


def test_what_an_unfinished_commit_moved_goes_when_another_merge_starts_over(
    world: World, out: Path, strike: Callable[..., Strikes]
) -> None:
    plan, number = world.plan(out, "shards"), 1
    while True:  # until a kill has left files under final names
        assert killed_at(plan, number, strike)
        if any(path.name.startswith("model-") for path in out.glob("*.safetensors")):
            break
        shutil.rmtree(out, ignore_errors=True)
        number += 1
    with pytest.raises(OutputError, match="another merge") as caught:
        running.merge(world.plan(out, "single"))
    assert "--fresh" in caught.value.hint
    running.merge(world.plan(out, "single"), fresh=True)
    assert digests(out) == world.reference("single")
