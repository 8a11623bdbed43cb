"""mergeforge extract-lora."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from mergeforge.lora.extract import Extraction, Found

SHOWN = 8  # changes that the adapter lacks, listed before "and more"


@click.command("extract-lora")
@click.argument("tuned")
@click.option("--base", required=True, metavar="MODEL", help="The model that TUNED was made from.")
@click.option("--out", required=True, metavar="DIR", help="The adapter's folder.")
@click.option("--rank", type=int, metavar="R", help="The largest rank of a module.")
@click.option("--energy", type=float, metavar="SHARE", help="The smallest rank that keeps it of |D|^2, e.g. 0.95.")
@click.option("--svd", default="auto", metavar="HOW", show_default=True, help="auto, exact or randomised.")
@click.option(
    "--embeddings",
    default="save",
    metavar="HOW",
    show_default=True,
    help="Changed embeddings and output head: save (whole), lora (factors) or skip.",
)
@click.option("--save-rest", is_flag=True, help="Hold changed norms, biases and the like whole.")
@click.option("--include", multiple=True, metavar="REGEX", help="Only tensors whose names match (repeatable).")
@click.option("--exclude", multiple=True, metavar="REGEX", help="No tensors whose names match (repeatable).")
@click.option("--dtype", default="float32", metavar="DTYPE", show_default=True, help="Of the factors; or bfloat16.")
@click.option("--memory", metavar="SIZE", help="Working memory, e.g. 2GiB.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
@click.option("--threads", type=int, metavar="N", help="Workers.")
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights, with torch's weights_only loader.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print every module.")
def extract_lora(tuned: str, *, out: str, as_json: bool, quiet: bool, verbose: bool, base: str, **options: Any) -> None:
    """Write the difference of TUNED and its base as a PEFT LoRA adapter.

    The report tells the error of every module, as measured on what is written; DIR/extraction.json
    keeps it.

    \b
    mergeforge extract-lora ./tuned --base org/model --rank 64 --out ./adapter
    mergeforge extract-lora ./tuned --base ./model --energy 0.95 --rank 256 --out ./adapter
    """
    started = time.monotonic()
    from mergeforge.cli import _progress
    from mergeforge.lora import extract

    plan = extract.plan_extraction(tuned, base, out, **options)
    to = _progress.console()
    found = list(_watched(plan, extract.extract(plan), to, quiet=quiet))
    if as_json:
        click.echo(json.dumps(extract.read_report(plan)))
    if quiet or as_json:
        return
    _show(extract.make_report(plan, found), to, verbose=verbose)
    to.print(f"wrote {plan.out} in {time.monotonic() - started:.1f} s ({plan.dtype} factors)", markup=False)


def _watched(plan: Extraction, found: Iterable[Found], to: Console, *, quiet: bool) -> Iterator[Found]:
    """Pass on what is found, with a bar on a terminal."""
    if quiet or not to.is_terminal:
        yield from found
        return
    from rich.progress import track

    yield from track(found, total=len(plan.jobs), console=to, description="tensors", transient=True)


def _show(report: Any, to: Console, *, verbose: bool) -> None:
    """Modules that are alike as one row: the layer numbers are left out."""
    from rich.markup import escape

    from mergeforge.core.sizes import show_size
    from mergeforge.errors import listing

    groups = _groups(report.factored, verbose=verbose)
    rows: list[tuple[str, ...]] = [("module", "count", "rank", "energy kept", "error |D-BA|/|D|")]
    for name, group in groups.items():
        columns = (_range([getattr(one, fact) for one in group]) for fact in ("rank", "energy", "error"))
        rows.append((name, str(len(group)), *columns))
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        to.print("   ".join(cells).rstrip(), markup=False)
    to.print(f"error of all factors together: {100 * report.error:.4g} % of the change", markup=False)
    if report.saved:
        nbytes = sum(pair.tuned.info.nbytes for pair in report.saved.values())
        to.print(f"held whole: {listing(report.saved)} ({show_size(nbytes)})", markup=False)
    if left_out := sum(one.left_out for one in report.found):
        to.print(f"left out by --include or --exclude: {left_out} tensors", markup=False)
    if report.not_held:
        to.print(f"[yellow]note[/]     {len(report.not_held)} changed tensors are not in the adapter:")
        for one in report.not_held if verbose else report.not_held[:SHOWN]:
            relative = f" (changed by {100 * one.norm / one.base_norm:.3g} %)" if one.base_norm else ""
            to.print(f"           {one.pair.name}{relative}: {one.pair.way}", markup=False)
        to.print(f"         so it gives back all but {100 * report.total_error:.4g} % of the change", markup=False)
    for note in report.notes:
        to.print(f"[yellow]note[/]     {escape(note)}")


def _groups(found: Sequence[Found], *, verbose: bool) -> dict[str, list[Found]]:
    groups: dict[str, list[Found]] = {}
    for one in found:
        parts = [part if not part.isdigit() else "*" for part in one.pair.module.split(".")]
        groups.setdefault(one.pair.module if verbose else ".".join(parts), []).append(one)
    return groups


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
