"""Plans, notes and progress on the terminal: a bar on a terminal, a plain line now and then elsewhere, on stderr."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from mergeforge.cli._byte_count import WIDE, ByteCount
from mergeforge.core.messages import without_warnings
from mergeforge.core.tensor_info import Tile
from mergeforge.execute.unfinished import finished_tiles
from mergeforge.planner import Plan, plan_page

PLAIN_SECONDS = 10.0  # between two plain lines
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
    """Print what the user should know before the merge: warnings, then notes."""
    show_warnings(plan.warnings, to)
    for note in (*without_warnings(plan.notes), *plan.machine_notes):
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
def steps(total: int, to: Console) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that shows a step and a text: a bar on a terminal, a plain line now and then elsewhere."""
    if not to.is_terminal:
        yield _StepLines(total, to)
        return
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=to) as progress:
        task = progress.add_task("", total=total, text="")
        yield lambda step, text: progress.update(task, completed=step or None, text=escape(text))


class _StepLines:
    """A line for the first step, the last one, and every PLAIN_SECONDS; a text without a step is printed at once."""

    def __init__(self, total: int, to: Console) -> None:
        self.total = total
        self.to = to
        self._last = -PLAIN_SECONDS
        self._step = 0

    def __call__(self, step: int, text: str) -> None:
        now = time.monotonic()
        if step == self._step or step == self.total or now - self._last > PLAIN_SECONDS:
            self._last = now
            self.to.print(f"step {step} of {self.total}: {text}" if step else text, markup=False)
        self._step = step
