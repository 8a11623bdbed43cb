"""Plans, notes and progress on the terminal: a bar on a terminal, a plain line now and then elsewhere, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mergeforge.core.sizes import format_size
from mergeforge.core.tensor_info import Tile
from mergeforge.planner import Plan, plan_page
from mergeforge.tensors.budget import resident_memory

PLAIN_SECONDS = 10.0  # between two plain lines


def console(*, stderr: bool = True) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def show_plan(plan: Plan, to: Console) -> None:
    """Print the plan as a page: inputs, what is done to each group of tensors, bytes, memory, disk, notes."""
    first, _, rest = plan_page(plan, notes=False).partition("\n")
    to.print(first, markup=False, style="bold")
    to.print(rest, markup=False)
    show_notes(plan, to)


def show_notes(plan: Plan, to: Console) -> None:
    for note in (*plan.notes, *plan.machine_notes):
        to.print(f"[yellow]note[/]     {escape(note)}")


def watch(plan: Plan, tiles: Iterable[Tile], to: Console, *, quiet: bool = False) -> Iterator[Tile]:
    """Pass the tiles on, showing progress."""
    if quiet:
        yield from tiles
    elif to.is_terminal:
        yield from _bar(plan, tiles, to)
    else:
        yield from _lines(plan, tiles, to)


class _Count:
    """How many bytes and tensors are done, and the speed."""

    def __init__(self, plan: Plan) -> None:
        self.widths = {tensor_plan.info.name: tensor_plan.info.row_nbytes for tensor_plan in plan.tensor_plans}
        self.left = {tensor_plan.info.name: len(tensor_plan.tiles) for tensor_plan in plan.tensor_plans}
        self.total = sum(tensor_plan.info.nbytes for tensor_plan in plan.tensor_plans)
        self.started = time.monotonic()
        self.nbytes = 0

    def add(self, tile: Tile) -> None:
        self.nbytes += tile.rows * self.widths[tile.name]
        self.left[tile.name] -= 1

    def text(self) -> str:
        done = sum(not left for left in self.left.values())
        speed = self.nbytes / max(time.monotonic() - self.started, 1e-3)
        sizes = f"{format_size(self.nbytes)} of {format_size(self.total)}, {format_size(speed)}/s"
        return f"{sizes}, {done} of {len(self.left)} tensors, {format_size(resident_memory())} memory"


def _bar(plan: Plan, tiles: Iterable[Tile], to: Console) -> Iterator[Tile]:
    count = _Count(plan)
    columns = (BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=to, transient=True) as progress:
        task = progress.add_task("", total=count.total, text="")
        for tile in tiles:
            count.add(tile)
            progress.update(task, completed=count.nbytes, text=count.text())
            yield tile


def _lines(plan: Plan, tiles: Iterable[Tile], to: Console) -> Iterator[Tile]:
    count, last = _Count(plan), time.monotonic()
    for tile in tiles:
        count.add(tile)
        if time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            seconds = (last - count.started) * (count.total / max(count.nbytes, 1) - 1)
            to.print(f"{100 * count.nbytes / max(count.total, 1):3.0f} %  {count.text()}, {seconds:.0f} s left")
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
