"""What a person sees: the plan as tables, the tiles as a bar, an error as three lines.

A bar on a terminal, a plain line now and then elsewhere. Everything goes to stderr.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mergeforge.core.sizes import show_size
from mergeforge.core.tensor_info import Tile
from mergeforge.gguf.quantize import backend
from mergeforge.lora.combine import Join
from mergeforge.planner import Plan
from mergeforge.tensors.budget import resident_memory

PLAIN_SECONDS = 10.0  # between two plain lines


def console(*, stderr: bool = True) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def show_plan(plan: Plan, to: Console) -> None:
    """Inputs, what happens to each group of tensors, bytes, memory, disk, notes."""
    to.print(f"[bold]{plan.recipe.method_name}[/] -> {escape(str(plan.out))}")
    inputs = Table("input", "tensors", "bytes", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for table in plan.inputs.checkpoints:
        name = f"{table.label} at {table.revision[:10]}" if table.revision else table.label
        inputs.add_row(escape(name), str(len(table.tensors)), show_size(table.nbytes))
    to.print(inputs, "")
    to.print(_groups(plan), "")
    away = f", {show_size(plan.nbytes_streamed)} of it where it lies" if plan.nbytes_streamed else ""
    to.print(f"reads    {show_size(plan.nbytes_read)}{away}")
    for line in _written(plan):
        to.print(line, markup=False)
    device = f"{plan.budget.threads} worker{'s' if plan.budget.threads > 1 else ''} on {plan.budget.device}"
    to.print(f"memory   {show_size(plan.peak)} at most of {show_size(plan.budget.memory)} given, {device}")
    to.print(f"disk     {_disk(plan)}")
    show_notes(plan, to)


def _written(plan: Plan) -> Iterator[str]:
    """What is written, a line a format."""
    files = len(plan.checkpoint.files)
    if files:
        yield f"writes   {show_size(plan.checkpoint.nbytes)} in {files} safetensors file{'s' if files > 1 else ''}"
    if plan.streams and (to := plan.recipe.output.publish):
        yield f"sends    each file to {to.repo} when it is finished, and removes it here"
    if plan.combination:
        ranks = sum(one.rank for one in plan.combination.sums)
        cut = "every rank kept" if plan.combination.exact else f"cut to {_cut(plan.combination)}"
        yield f"writes   one adapter of {len(plan.combination.sums)} modules from {ranks} ranks in all, {cut}"
    for gguf in plan.ggufs:
        sizes = sorted(gguf.nbytes_by_type.items(), key=lambda item: -item[1])
        kinds = ", ".join(f"{kind} {show_size(nbytes)}" for kind, nbytes in sizes)
        name = next(iter(gguf.layout.files))
        yield f"writes   {show_size(gguf.layout.nbytes)} in {name}: {gguf.bits_per_weight:.2f} bits a weight ({kinds})"
    if plan.ggufs:
        yield f"         encoded by {backend(plan.budget.device)} from {plan.recipe.output.gguf_from} values"


def _cut(join: Join) -> str:
    parts = [f"rank {join.rank}"] if join.rank else []
    return " and ".join(parts + ([f"{join.energy:.4g} of the energy"] if join.energy else []))


def show_notes(plan: Plan, to: Console) -> None:
    for note in plan.notes:
        to.print(f"[yellow]note[/]     {escape(note)}")


def plan_facts(plan: Plan) -> dict[str, object]:
    """The plan as JSON."""
    return {
        "merge_method": plan.recipe.method_name,
        "out": str(plan.out),
        "inputs": [
            {"name": table.label, "revision": table.revision, "bytes": table.nbytes}
            for table in plan.inputs.checkpoints
        ],
        "bytes_read": plan.nbytes_read,
        "bytes_streamed": plan.nbytes_streamed,
        "bytes_written": plan.nbytes_written,
        "disk": plan.disk,
        "files": {name: file.nbytes for name, file in plan.files.items()},
        "gguf": [
            {"type": gguf.file_type.label, "files": list(gguf.layout.files), "bits_per_weight": gguf.bits_per_weight}
            for gguf in plan.ggufs
        ],
        "peak_memory": plan.peak,
        "memory": plan.budget.memory,
        "threads": plan.budget.threads,
        "device": plan.budget.device,
        "tensors": {
            piece.info.name: {
                "action": plan.summaries[piece.info.name],
                "dtype": piece.info.dtype,
                "shape": list(piece.info.shape),
                "tiles": len(piece.tiles),
            }
            for piece in plan.tensor_plans
        },
        "notes": list(plan.notes),
        "fingerprint": plan.fingerprint,
    }


def watch(plan: Plan, tiles: Iterable[Tile], to: Console, *, quiet: bool = False) -> Iterator[Tile]:
    """Pass the tiles on, and show how far they have come."""
    if quiet:
        yield from tiles
    elif to.is_terminal:
        yield from _bar(plan, tiles, to)
    else:
        yield from _lines(plan, tiles, to)


def _groups(plan: Plan) -> Table:
    """Tensors that are treated alike, as rows: names with the layer numbers left out."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for piece in plan.tensor_plans:
        action = plan.summaries[piece.info.name]
        counts[action] += 1
        sizes[action] += piece.info.nbytes
    table = Table("tensors", "way", "bytes", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for action, count in counts.most_common():
        table.add_row(str(count), escape(action), show_size(sizes[action]))
    return table


def _disk(plan: Plan) -> str:
    import shutil

    from mergeforge.planner import existing_folder

    free = shutil.disk_usage(existing_folder(plan.out)).free
    return f"{show_size(plan.disk)} needed, {show_size(free)} free"


class _Count:
    """Bytes and tensors done, and the speed."""

    def __init__(self, plan: Plan) -> None:
        self.widths = {piece.info.name: piece.info.row_nbytes for piece in plan.tensor_plans}
        self.left = {piece.info.name: len(piece.tiles) for piece in plan.tensor_plans}
        self.total = sum(piece.info.nbytes for piece in plan.tensor_plans)
        self.started = time.monotonic()
        self.nbytes = 0

    def add(self, tile: Tile) -> None:
        self.nbytes += tile.rows * self.widths[tile.name]
        self.left[tile.name] -= 1

    def text(self) -> str:
        done = sum(not left for left in self.left.values())
        speed = self.nbytes / max(time.monotonic() - self.started, 1e-3)
        sizes = f"{show_size(self.nbytes)} of {show_size(self.total)}"
        return (
            f"{sizes}, {show_size(speed)}/s, {done} of {len(self.left)} tensors, {show_size(resident_memory())} memory"
        )


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
    """Gives a function that takes a step and a text: a bar on a terminal, a plain line now and then elsewhere."""
    if not to.is_terminal:
        yield _StepLines(total, to)
        return
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=to) as progress:
        task = progress.add_task("", total=total, text="")
        yield lambda step, text: progress.update(task, completed=step or None, text=escape(text))


class _StepLines:
    """A line for the first step, the last one, and every PLAIN_SECONDS; whatever is no step is told at once."""

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
