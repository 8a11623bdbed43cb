"""The end of a merge or conversion: files with sizes, time, peak memory, warnings, and the next commands."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.file_names import RECEIPT
from mergeforge.core.sizes import format_size
from mergeforge.execute.receipt import peak_rss
from mergeforge.execute.workspace import read_receipt
from mergeforge.operations.merge import result_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from mergeforge.operations.convert_gguf import GGUFConversion
    from mergeforge.planner import Plan

LISTED = 12  # files of weights, before "and more"
WEIGHTS = (".safetensors", ".gguf")


def show_result(plan: Plan, to: Console, seconds: float) -> None:
    """Print what a merge has written, its warnings, and the next commands."""
    from mergeforge.cli._progress import show_warnings

    receipt = read_receipt(plan.out) or {}
    files: Mapping[str, Any] = receipt.get("files", {})
    sizes = {name: facts["size"] for name, facts in files.items() if name.endswith(WEIGHTS)}
    show_files(to, _target(plan), {name: (size, _format(plan, name)) for name, size in sizes.items()}, seconds)
    _show_others([*(name for name in files if name not in sizes), RECEIPT], to)
    show_warnings(result_warnings(plan), to)
    show_next(list(next_commands(plan)), to)


def result_as_json(plan: Plan, seconds: float) -> dict[str, Any]:
    """The same as values for JSON."""
    return {
        "out": str(plan.out),
        "bytes": plan.nbytes_written,
        "seconds": round(seconds, 3),
        "files": list(plan.files),
        "peak_memory": peak_rss(),
        "warnings": list(result_warnings(plan)),
    }


def show_conversion(conversion: GGUFConversion, to: Console, seconds: float, out: str | None) -> None:
    """Print what a conversion has written. `out`: the path as the user gave it."""
    from mergeforge.cli._progress import show_warnings

    plan, folder = conversion.plan, Path(out).parent if conversion.file and out else conversion.out
    kinds = [_format(plan, name) for name in plan.files]
    files = {path.name: (path.stat().st_size, kind) for path, kind in zip(conversion.files, kinds, strict=True)}
    show_files(to, str(folder), files, seconds)
    show_warnings(plan.warnings, to)
    names = dict(zip(plan.files, conversion.files, strict=True))
    chats = [f"mergeforge chat {quoted(folder / names[name].name)}" for name in plan.gguf_names[:1]]
    has_receipt = not conversion.file and read_receipt(folder) is not None
    show_next([f"mergeforge verify {quoted(folder)}"] * has_receipt + chats, to)


def show_files(to: Console, target: str, files: Mapping[str, tuple[int, str]], seconds: float) -> None:
    """Print how much was written and a line for each file of weights. `files`: size and format by name."""
    total = format_size(sum(size for size, _ in files.values()))
    to.print(f"wrote {total} to {target} in {seconds:.1f} s, peak memory {format_size(peak_rss())}", markup=False)
    width = max(map(len, files), default=0)
    for name, (size, kind) in list(files.items())[:LISTED]:
        to.print(f"  {name:{width}}  {format_size(size):>9}  {kind}".rstrip(), markup=False)
    if len(files) > LISTED:
        to.print(f"  and {len(files) - LISTED} more", markup=False)


def show_next(commands: Sequence[str], to: Console) -> None:
    for index, command in enumerate(commands):
        to.print(f"{'' if index else 'next:':6}{command}", markup=False)


def next_commands(plan: Plan) -> Iterator[str]:
    """Commands that a user is likely to want after this merge."""
    if plan.streams:
        return
    out = quoted(plan.out)
    yield f"mergeforge verify {out}"
    if plan.combination:
        yield f"mergeforge inspect {quoted(plan.out / 'adapter') if plan.files else out}"
    base = plan.inputs.base
    if base is not None and plan.checkpoint.files and Path(base.checkpoint.label).exists():
        yield f"mergeforge diff {quoted(base.checkpoint.label)} {out}"
    if plan.gguf_models:
        yield f"mergeforge chat {quoted(plan.out / plan.gguf_names[0])}"
    elif plan.checkpoint.files:
        yield f"mergeforge chat {out}"


def quoted(path: str | Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _target(plan: Plan) -> str:
    publish = plan.recipe.output.publish
    return f"https://huggingface.co/{publish.repo}" if publish and publish.stream else str(plan.out)


def _format(plan: Plan, name: str) -> str:
    for gguf in plan.ggufs:
        if name in gguf.layout.files:
            return f"{gguf.file_type.label}, {gguf.bits_per_weight:.2f} bits per weight"
    dtypes = {tensor.dtype for tensor in plan.tensors if plan.checkpoint.extents[tensor.name].file == name}
    return ", ".join(sorted(dtypes))


def _show_others(names: Iterable[str], to: Console) -> None:
    """The small files, in as few lines as they fit into."""
    text = ", ".join(sorted(names))
    width = to.width if to.is_terminal else len(text) + 2
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    to.print(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", **options), markup=False)
