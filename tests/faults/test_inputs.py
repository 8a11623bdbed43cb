"""Inputs that change, break or hold what must not be written; and a run that is stopped by hand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file
from support.faults.breaking import SMALL, Strikes, World, digests, finished_files

from mergeforge.errors import MergeforgeError, OutputError, SourceError
from mergeforge.execute import executor
from mergeforge.execute.journal import read_journal
from mergeforge.operations.synthetic_models import write_model
from mergeforge.planner import WORK, Plan, make_plan

NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Path:
    """Inputs that a test may change."""
    shutil.copytree(world.root / "base", tmp_path / "base")
    shutil.copytree(world.root / "adapter", tmp_path / "adapter")
    return tmp_path


def plan_of(copied: Path, **options: Any) -> Plan:
    recipe = {"base_model": str(copied / "base"), "adapters": [str(copied / "adapter")]}
    return make_plan(recipe, out=copied / "out", threads=1, **options)


def noted(out: Path) -> int:
    journal = read_journal(out / WORK)
    assert journal is not None
    journal.close()
    return len(journal.done)


def in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x11")


def replaced(path: Path) -> None:
    data = path.read_bytes()
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("how", [in_place, replaced, truncated, removed])
@pytest.mark.parametrize("which", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_an_input_that_changes_during_the_run(
    copied: Path, eager: None, how: Callable[[Path], None], which: str
) -> None:
    tiles = executor.run_tiles(plan_of(copied))
    next(tiles)
    how(copied / which)
    with pytest.raises(SourceError, match="changed while it was read") as caught:
        for _ in tiles:
            pass
    assert which.rpartition("/")[2] in str(caught.value)
    assert caught.value.exit_code == 3
    assert finished_files(copied / "out") == {}
    assert noted(copied / "out") <= 2, "what was computed after the change is not kept"


def test_tiles_computed_from_changed_input_are_not_kept_when_the_input_is_restored(copied: Path, eager: None) -> None:
    """Even with the old time stamp: the file is the one that was planned with, the tiles are not."""
    executor.run_plan(plan_of(copied))
    reference = digests(copied / "out")
    shutil.rmtree(copied / "out")
    weights = copied / "base" / "model.safetensors"
    before, data = weights.stat(), weights.read_bytes()
    tiles = executor.run_tiles(plan_of(copied))
    next(tiles)
    with open(weights, "r+b") as file:
        file.seek(len(data) // 2)
        file.write(os.urandom(len(data) // 2))
    with pytest.raises(MergeforgeError):
        for _ in tiles:
            pass
    with open(weights, "r+b") as file:
        file.write(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    executor.run_plan(plan_of(copied))
    assert digests(copied / "out") == reference


def test_an_input_that_changed_between_runs_makes_a_different_merge(copied: Path) -> None:
    tiles = executor.run_tiles(plan_of(copied))
    next(tiles)
    tiles.close()
    in_place(copied / "base" / "model.safetensors")
    with pytest.raises(OutputError, match="another merge"):
        executor.run_plan(plan_of(copied))
    executor.run_plan(plan_of(copied), fresh=True)


def test_an_input_that_cannot_be_read(copied: Path, strike: Callable[..., Strikes]) -> None:
    def broken(original: Any, fd: int, *arguments: Any) -> Any:
        raise OSError(5, "Input/output error")

    plan = plan_of(copied)
    strike(("preadv",), 3, broken)
    with pytest.raises(SourceError, match=r"model\.safetensors cannot be read: Input/output error"):
        executor.run_plan(plan)
    executor.run_plan(plan)


def test_inputs_are_closed(world: World, out: Path) -> None:
    executor.run_plan(world.plan(out))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        executor.run_plan(world.plan(out), overwrite=True)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- values


def with_value(folder: Path, name: str, value: float, dtype: str = "F32") -> None:
    """A base with one value that is odd."""
    write_model(folder, SMALL, dtype=dtype)
    weights = folder / "model.safetensors"
    from mergeforge.io.safetensors_header import read_header

    info, offset = read_header(weights).tensors[name]
    with open(weights, "r+b") as file:
        file.seek(offset + 7 * info.bits // 8)
        file.write(numpy.array(value, {"F32": "float32", "F16": "float16"}[dtype]).tobytes())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(copied: Path, value: float) -> None:
    with_value(copied / "base", QUERY, value)
    with pytest.raises(
        SourceError, match=f"{QUERY} would hold 1 infinite or NaN values .F32, first at element 7"
    ) as caught:
        executor.run_plan(plan_of(copied))
    assert "--allow-nonfinite" in caught.value.command_hint
    assert finished_files(copied / "out") == {}
    executor.run_plan(plan_of(copied, allow_nonfinite=True))
    merged = load_file(copied / "out" / "model.safetensors")
    assert not numpy.isfinite(merged[QUERY].reshape(-1)[7])
    assert numpy.isfinite(merged[QUERY]).sum() == merged[QUERY].size - 1


@pytest.mark.parametrize("name", [NORM, QUERY])
def test_values_that_do_not_fit_the_dtype(copied: Path, name: str) -> None:
    with_value(copied / "base", name, 70000.0)
    with pytest.raises(SourceError, match=f"{name} would hold 1 infinite") as caught:
        executor.run_plan(plan_of(copied, sets=["dtype=float16"]))
    assert "bfloat16" in caught.value.hint
    executor.run_plan(plan_of(copied, sets=["dtype=bfloat16"]), fresh=True)


def test_the_largest_values_that_fit(copied: Path) -> None:
    with_value(copied / "base", NORM, 65519.0)
    executor.run_plan(plan_of(copied, sets=["dtype=float16"]))
    assert load_file(copied / "out" / "model.safetensors")[NORM].reshape(-1)[7] == 65504


def test_values_that_overflow_in_the_merge(copied: Path) -> None:
    with_value(copied / "base", QUERY, 65504.0, "F16")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(copied / "base"), "parameters": {"weight": 2.0}}],
        "parameters": {"normalize": False},
    }
    with pytest.raises(SourceError, match=f"{QUERY} would hold 1 infinite"):
        executor.run_plan(make_plan(recipe, out=copied / "out"))


# --- stopped by hand


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_a_stopped_run_keeps_finished_tiles(world: World, out: Path, stop: type[BaseException]) -> None:
    reference, plan = world.reference(), world.plan(out)
    tiles = executor.run_tiles(plan)
    taken = [next(tiles) for _ in range(4)]
    with pytest.raises(stop):
        tiles.throw(stop)
    assert noted(out) >= len(taken)
    assert finished_files(out) == {}
    executor.run_plan(plan)
    assert digests(out) == reference


def test_a_consumer_that_fails(world: World, out: Path) -> None:
    plan = world.plan(out)

    def consume() -> None:
        for count, _ in enumerate(executor.run_tiles(plan)):
            if count == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    import gc

    gc.collect()
    executor.run_plan(plan)
    assert digests(out) == world.reference()


def test_inputs_are_never_written(world: World, out: Path) -> None:
    before = {name: digests(world.root / name) for name in ("base", "tuned", "adapter")}
    executor.run_plan(world.plan(out))
    executor.run_plan(world.plan(out, "single"), overwrite=True)
    assert {name: digests(world.root / name) for name in before} == before
