"""What a terminal of 80 columns shows while a merge runs, when it resumes, and at its end."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mergeforge
from mergeforge.cli import _progress, _result, run_command
from mergeforge.cli._byte_count import ByteCount, format_seconds
from mergeforge.core.messages import WarningText
from mergeforge.execute.unfinished import finished_tiles
from mergeforge.planner import Plan

RECIPE = {"base_model": "base", "adapters": ["adapters/a"], "output": {"path": "merged", "gguf": ["q4_k_m"]}}
OPTIONS: dict[str, Any] = {"device": "cpu", "memory": "16MiB", "threads": 1}


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, soft_wrap=True, highlight=False)


def shown(to: Console) -> str:
    """What was printed, without control sequences."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", to.file.getvalue())  # type: ignore[attr-defined]  # StringIO


def interrupted(plan: Plan, tiles: int) -> None:
    """Run a merge up to some tiles."""
    running = mergeforge.iter_run(plan)
    for _ in range(tiles):
        next(running)
    running.close()  # type: ignore[attr-defined]  # a generator


def test_the_total_is_one_number_from_start_to_end(models: Path) -> None:
    """The bytes of the output files: the plan's, those of the last tile, and those on the disk."""
    plan = mergeforge.plan(RECIPE, **OPTIONS)
    count = ByteCount(plan)
    assert count.total == plan.nbytes_written
    for tile in mergeforge.iter_run(plan):
        count.add(tile)
        assert count.total == plan.nbytes_written
    assert count.done == count.total == sum((plan.out / name).stat().st_size for name in plan.files)


def test_lines_fit_into_80_columns(models: Path) -> None:
    """With sizes of any length; percentage, rate and time left are all there."""
    plan = mergeforge.plan(RECIPE, **OPTIONS)
    count = ByteCount(plan)
    for total, done in ((999_900_000_000, 899_000_000), (16_800_000, 999_900), (700_000, 650_000)):
        count.total, count.done, count._started = total, done, count._started - 4000
        line = count.line(80)
        assert 8 + 1 + len(line) <= 80 and re.fullmatch(r" *\d+ %  .+ of .+  .+/s  [\d:]+ left", line), line


def test_a_resumed_merge_says_what_is_done_and_its_rate_excludes_it(models: Path) -> None:
    """The rate counts the bytes of new tiles only."""
    plan = mergeforge.plan(RECIPE, **OPTIONS)
    interrupted(plan, 12)
    resumed = finished_tiles(plan)
    assert len(resumed) >= 12
    count = ByteCount(plan, resumed)
    start = count.done
    tiles = [tile for tensor_plan in plan.tensor_plans for tile in tensor_plan.tiles]
    for tile in sorted(tiles, key=lambda tile: tile not in resumed):
        count.add(tile)
        assert tile not in resumed or (count.rate == 0 and count.seconds_left is None and count.done == start)
    assert count.done == count.total
    to = terminal()
    for _ in _progress.watch(plan, mergeforge.iter_run(plan), to):
        pass
    assert re.search(r"^resuming, \d+ % done$", shown(to), re.MULTILINE)
    assert f"resuming, {100 * start / count.total:.0f} % done" in shown(to)
    assert "resuming" not in shown(_watched_afresh(plan))


def _watched_afresh(plan: Plan) -> Console:
    to = terminal()
    running: Iterator[Any] = mergeforge.iter_run(plan, fresh=True, overwrite=True)
    for _ in _progress.watch(plan, running, to, fresh=True):
        pass
    return to


def test_finished_tiles_of_another_tiling_are_found(models: Path) -> None:
    """A tile is finished if earlier tiles cover its rows."""
    plan = mergeforge.plan(RECIPE, **OPTIONS)
    interrupted(plan, 12)
    names = {tile.name for tile in finished_tiles(plan)}
    other = mergeforge.plan(RECIPE, **{**OPTIONS, "memory": "256MiB"})
    assert {tile.name for tile in finished_tiles(other)} == names
    changed = mergeforge.plan({**RECIPE, "dtype": "float32"}, **OPTIONS)
    assert finished_tiles(changed) == frozenset()


def test_the_end_lists_files_sizes_memory_time_and_next_commands(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "recipe.yaml").write_text("base_model: base\nadapters: [adapters/a]\noutput: {gguf: [q4_k_m]}\n")
    assert run_command(["run", "recipe.yaml", "--out", "my model"]) == 0
    text = capsys.readouterr().err
    assert re.search(r"^wrote .+ to my model in [\d.]+ s, peak memory [\d.]+ [MG]B$", text, re.MULTILINE)
    assert re.search(r"^  model.safetensors  +[\d.]+ KB  BF16$", text, re.MULTILINE)
    assert re.search(r"^  my model-Q4_K_M.gguf +[\d.]+ KB  Q4_K_M, [\d.]+ bits per weight$", text, re.MULTILINE)
    for command in ("verify 'my model'", "diff base 'my model'", "chat 'my model/my model-Q4_K_M.gguf'"):
        assert f"mergeforge {command}\n" in text
    assert run_command(["verify", "my model"]) == 0


def test_an_adapter_is_not_reported_as_0_bytes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "recipe.yaml").write_text(
        "base_model: base\nadapters: [adapters/a, adapters/b]\noutput: {path: out, safetensors: false, adapter: true}\n"
    )
    assert run_command(["run", "recipe.yaml"]) == 0
    text = capsys.readouterr().err
    assert " 0 B" not in text and "adapter_model.safetensors" in text


def test_warnings_are_shown_first_and_at_the_end(models: Path) -> None:
    plan = mergeforge.plan(RECIPE, **OPTIONS)
    warning = WarningText(
        "the adapter does nothing, which is said here in a line that is longer than a terminal is wide"
    )
    object.__setattr__(plan, "notes", ("a note", warning))
    to = terminal()
    _progress.show_notes(plan, to)
    lines = shown(to).splitlines()
    assert (
        lines[0].startswith("warning: the adapter") and lines[1].startswith(" " * 9) and lines[2] == "note     a note"
    )
    assert max(map(len, lines)) <= 80 and "note     the adapter" not in shown(to)
    mergeforge.run(plan)
    _result.show_result(plan, to, 1.0)
    assert shown(to).count("warning: the adapter") == 2
    page = str(plan)
    assert page.index("warning  the adapter") < page.index("note     a note")
    facts = mergeforge.planner.plan_as_json(plan)
    assert facts["warnings"] == [warning] and facts["notes"] == ["a note", *plan.machine_notes]


def test_the_plan_says_memory_default_and_dtype(models: Path) -> None:
    page = str(mergeforge.plan(RECIPE, device="cpu"))
    assert re.search(r"memory   at most [\d.]+ [MG]B: [\d.]+ [MG]B for Python and its libraries,", page)
    assert "(the default); " in page and "1 safetensors file: BF16" in page
    assert "to work in, of 16.8 MB allowed; 1 worker on cpu" in str(mergeforge.plan(RECIPE, **OPTIONS))


def test_times() -> None:
    assert [format_seconds(seconds) for seconds in (0.4, 59.6, 750, 3900)] == ["0:00", "1:00", "12:30", "1:05:00"]
