"""Plans, notes and progress on the terminal: a bar on a terminal, a plain line now and then elsewhere, on stderr."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mergeforge.cli._byte_count import WIDE, ByteCount
from mergeforge.core.messages import warnings_in, without_warnings
from mergeforge.core.tensor_info import Tile
from mergeforge.execute.unfinished import finished_tiles
from mergeforge.planner import Plan, plan_page
from mergeforge.train.progress import TOTAL, is_kept, metrics_text

if TYPE_CHECKING:
    from mergeforge.train.loop.context import MetricCallback

PLAIN_SECONDS = 10.0  # between two plain lines
ROW_SECONDS = 3.0  # between two plain lines about rows of data
INDENT = 9  # the column of the text of notes and of the plan's lines


def console(*, stderr: bool = True) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def show_plan(plan: Plan, to: Console, target: str = "") -> None:
    """Print the plan as a page: inputs, what is done to each group of tensors, bytes, memory, disk, notes."""
    first, _, rest = plan_page(plan, notes=False, target=target).partition("\n")
    to.print(first, markup=False, style="bold")
    for line in rest.splitlines():
        print_wrapped(to, line)
    show_notes(plan, to)


def show_notes(plan: Plan, to: Console) -> None:
    """Print what the user should know before the merge."""
    print_notes((*plan.notes, *plan.machine_notes), to)


def print_notes(notes: Sequence[str], to: Console) -> None:
    """Print warnings, then the other notes."""
    show_warnings(warnings_in(notes), to)
    for note in without_warnings(notes):
        print_wrapped(to, f"note     {note}", "yellow", len("note"))


def show_warnings(warnings: Iterable[str], to: Console) -> None:
    for warning in warnings:
        print_wrapped(to, f"warning: {warning}", "bold yellow", len("warning:"))


def print_wrapped(to: Console, line: str, style: str = "", styled: int = 0) -> None:
    """Print a line whose text starts in column 10. A terminal gets it broken between words, and indented.

    `style`: of its first `styled` characters.
    """
    text = line
    if to.is_terminal and len(line) > to.width:
        options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * INDENT}
        text = textwrap.fill(line, to.width, **options)  # type: ignore[arg-type]  # a dict of its options
    shown = Text(text)
    shown.stylize(style, 0, styled)
    to.print(shown)


def watch(
    plan: Plan, tiles: Iterable[Tile], to: Console, *, quiet: bool = False, fresh: bool = False
) -> Iterator[Tile]:
    """Pass the tiles on, showing progress. `fresh`: an interrupted run is not resumed."""
    if quiet:
        yield from tiles
        return
    count = ByteCount(plan, frozenset() if fresh else finished_tiles(plan))
    if count.skipped:
        to.print(f"resuming, {100 * count.share:.0f} % done", markup=False)
    if not count.total:
        yield from tiles  # only an adapter is written
        return
    yield from _bar(count, tiles, to) if to.is_terminal else _lines(count, tiles, to)


def _bar(count: ByteCount, tiles: Iterable[Tile], to: Console) -> Iterator[Tile]:
    columns = (BarColumn(bar_width=max(8, min(40, to.width - 60))), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=to, transient=True) as progress:
        task = progress.add_task("", total=count.total, completed=count.done, text=count.line(to.width))
        for tile in tiles:
            count.add(tile)
            progress.update(task, completed=count.done, text=count.line(to.width))
            yield tile


def _lines(count: ByteCount, tiles: Iterable[Tile], to: Console) -> Iterator[Tile]:
    last = time.monotonic()
    for tile in tiles:
        count.add(tile)
        if time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            to.print(count.line(WIDE), markup=False)
        yield tile


@contextmanager
def step_bar(total: int, to: Console) -> Iterator[MetricCallback]:
    """A listener that shows a run's steps as a bar with the time left; notes and validation losses stay above it."""
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    with Progress(TextColumn("step"), *columns, console=to) as progress:
        task = progress.add_task("", total=total, text="")

        def show(line: Mapping[str, Any]) -> None:
            if TOTAL in line:
                progress.update(task, total=line[TOTAL])
            elif is_kept(line):
                place = f"step {line['step']}: " if line.get("step") else ""
                progress.console.print(f"{place}{metrics_text(line)}", markup=False)
            else:
                progress.update(task, completed=line["step"], text=escape(metrics_text(line)))

        yield show


@contextmanager
def row_count(to: Console, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A function that shows how many rows of data were read: a line on a terminal, one now and then elsewhere."""
    last = time.monotonic()
    if quiet:
        yield lambda rows: None
    elif to.is_terminal:
        with to.status("reading the data") as status:

            def update(rows: int) -> None:
                nonlocal last
                if time.monotonic() - last > 0.2:
                    last = time.monotonic()
                    status.update(f"reading the data: {rows:,} rows")

            yield update
    else:

        def show(rows: int) -> None:
            nonlocal last
            if time.monotonic() - last > ROW_SECONDS:
                last = time.monotonic()
                to.print(f"reading the data: {rows:,} rows", markup=False)

        yield show
