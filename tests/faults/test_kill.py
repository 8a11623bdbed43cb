"""Killed at any instant, the same command ends in the bytes of an undisturbed run (invariants I1, I2, I4)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from breaking import CHANGING, Strikes, World, assert_nothing_half_done, digests, go_on, merge_command

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
def test_killed_at_every_change_of_the_disk(world: World, out: Path, strike: Callable[..., Strikes]) -> None:
    reference, plan, number = world.reference(), world.plan(out), 1
    while killed_at(plan, number, strike):
        assert_nothing_half_done(out, reference)
        go_on(plan)
        assert digests(out) == reference, f"killed at change {number}"
        shutil.rmtree(out)
        number += 1
    assert digests(out) == reference
    assert number > 60


def test_killed_at_every_change_while_replacing_a_merge(
    world: World, out: Path, strike: Callable[..., Strikes], tmp_path: Path
) -> None:
    """Three shards and an index give way to one file: nothing stale is left, at whatever point it was killed."""
    old, new = world.reference("shards"), world.reference("single")
    kept = tmp_path / "kept"
    running.merge(world.plan(out, "shards"))
    shutil.copytree(out, kept)
    plan, number = world.plan(out, "single"), 1
    while killed_at(plan, number, strike, overwrite=True):
        assert_nothing_half_done(out, old, new)
        running.merge(plan, overwrite=True)
        assert digests(out) == new, f"killed at change {number}"
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        number += 1
    assert digests(out) == new
    assert number > 30


def test_killed_while_it_goes_on_after_a_kill(world: World, out: Path, strike: Callable[..., Strikes]) -> None:
    reference, plan, chance = world.reference(), world.plan(out), random.Random(5)
    for _ in range(12):
        while killed_at(plan, chance.randrange(1, 60), strike):
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


@pytest.fixture
def command(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe as a file, for the real command; the current folder is where `out` is written."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(world.recipe()))
    for name in ("undisturbed", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    subprocess.run(merge_command(recipe, Path("out")), check=True, capture_output=True)
    monkeypatch.chdir(tmp_path / "here")
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "rename", "unlink", "mkdir", "rmdir", "fallocate"])
def test_killed_by_strace(command: Path, call: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    out, reference = Path("out"), digests(Path("../undisturbed/out"))
    for number in (1, 2, 3, 5, 8, 13, 21):
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
        strace = ["strace", "-f", "-o", "/dev/null", *inject]
        done = subprocess.run([*strace, *merge_command(command, out, "--threads", "1")], capture_output=True)
        assert_nothing_half_done(out, reference)
        if done.returncode == 0:
            break
        done = subprocess.run(merge_command(command, out, "--threads", "1"), capture_output=True, text=True)
        assert done.returncode == 0 or "already holds a finished merge" in done.stderr
        assert digests(out) == reference
        shutil.rmtree(out)
    assert number > 1 or call in ("mkdir", "rmdir", "unlink")


@pytest.mark.slow
def test_killed_at_random_moments(command: Path) -> None:
    out, reference, chance = Path("out"), digests(Path("../undisturbed/out")), random.Random(7)
    for _ in range(6):
        process = subprocess.Popen(merge_command(command, out), stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(chance.uniform(1.0, 3.5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL if chance.random() < 0.7 else signal.SIGINT)
        process.wait()
        assert_nothing_half_done(out, reference)
    subprocess.run(merge_command(command, out), capture_output=True)
    assert digests(out) == reference
