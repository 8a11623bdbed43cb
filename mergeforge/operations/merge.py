"""A whole merge: check the Hub, compute every tile, publish. What `mergeforge run` does, with nothing printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mergeforge.core.messages import OnMessage
from mergeforge.core.tensor_info import Tile
from mergeforge.errors import RecipeError
from mergeforge.execute.executor import run_tiles
from mergeforge.execute.receipt import peak_rss
from mergeforge.execute.workspace import read_receipt
from mergeforge.hub.publish import check_access, plan_publication, publish
from mergeforge.operations.official_converter import convert_merged, find_converter, lacks_conversion
from mergeforge.planner import Plan


@dataclass(frozen=True)
class RunResult:
    """A finished merge.

    folder: the output folder. files: the files of weights in it. peak: this process's peak resident memory in bytes.
    warnings: what is probably not what the user meant (the receipt has them too). seconds: the time that it took.
    """

    folder: Path
    files: tuple[Path, ...]
    peak: int
    warnings: tuple[str, ...]
    seconds: float


def iter_run(
    plan: Plan, *, fresh: bool = False, overwrite: bool = False, on_message: OnMessage = lambda _: None
) -> Iterator[Tile]:
    """Do a merge, yielding each tile when it is written; publish the result at the end if the recipe says so.

    Resumes an interrupted run of the same merge. `fresh` discards that run, `overwrite` replaces a finished merge.
    `on_message` is called with a line for each upload. Raises OutputError if the output folder holds something else,
    BudgetError if the disk is full, SourceError if an input is bad; what is finished by then is kept for the next run.
    """
    if not plan.has_output:
        raise RecipeError("the plan has no output folder", hint="plan it with --out DIR")
    output = plan.recipe.output.publish
    if plan.recipe.output.converter:
        find_converter(plan.recipe.output.converter)
    if output:
        check_access(output.repo)  # before the work, not after it
    if fresh or overwrite or not lacks_conversion(plan):
        yield from run_tiles(plan, fresh=fresh, overwrite=overwrite, on_message=on_message)
    if plan.recipe.output.converter:
        convert_merged(plan, on_message=on_message)
    if output and not output.stream:
        publication = plan_publication(plan.out, output.repo, revision=output.revision, private=output.private)
        for uploaded in publish(publication):
            on_message(f"uploaded {uploaded}")


def run(
    plan: Plan,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    on_tile: Callable[[Tile], None] = lambda _: None,
    on_message: OnMessage = lambda _: None,
) -> RunResult:
    """Do a merge; iter_run() says what is done and raised."""
    started = time.monotonic()
    for tile in iter_run(plan, fresh=fresh, overwrite=overwrite, on_message=on_message):
        on_tile(tile)
    files = tuple(plan.out / name for name in plan.files)
    return RunResult(plan.out, files, peak_rss(), result_warnings(plan), time.monotonic() - started)


def result_warnings(plan: Plan) -> tuple[str, ...]:
    """All warnings about a finished merge: the plan's, and those that the receipt has about the result."""
    recorded = (read_receipt(plan.out) or {}).get("warnings", [])
    return tuple(dict.fromkeys([*plan.warnings, *recorded]))
