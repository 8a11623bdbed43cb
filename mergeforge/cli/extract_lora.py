"""mergeforge extract-lora."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _options

if TYPE_CHECKING:
    from rich.console import Console

    from mergeforge.lora.extract import Extraction, ExtractionReport, PairResult

SHOWN = 8  # changes missing from the adapter, listed before "and more"


@click.command("extract-lora")
@click.argument("tuned")
@click.option("--base", required=True, metavar="MODEL", help="The model that TUNED was fine-tuned from.")
@click.option("--out", required=True, metavar="DIR", help="Output folder of the adapter.")
@click.option("--rank", type=int, metavar="R", help="Maximum rank of a module.")
@click.option("--energy", type=float, metavar="SHARE", help="Smallest rank that keeps this share of |D|^2, e.g. 0.95.")
@click.option("--svd", default="auto", metavar="NAME", show_default=True, help="auto, exact or randomized.")
@click.option(
    "--embeddings",
    default="save",
    metavar="NAME",
    show_default=True,
    help="Changed embeddings and output head: save (whole), lora (factors) or skip.",
)
@click.option("--save-rest", is_flag=True, help="Also save changed norms, biases and the like, whole.")
@click.option("--include", multiple=True, metavar="REGEX", help="Only tensors whose names match (repeatable).")
@click.option("--exclude", multiple=True, metavar="REGEX", help="No tensors whose names match (repeatable).")
@click.option("--dtype", default="float32", metavar="DTYPE", show_default=True, help="Dtype of the factors.")
@_options.resources
@_options.allow_pickle
@click.option("--overwrite", is_flag=True, help="Replace an adapter in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@_options.quiet
@click.option("-v", "--verbose", is_flag=True, help="Print every module.")
def extract_lora(tuned: str, *, out: str, as_json: bool, quiet: bool, verbose: bool, base: str, **options: Any) -> None:
    """Write the difference of TUNED and its base as a PEFT LoRA adapter.

    The report lists the error of every module, measured on what is written; DIR/extraction.json keeps it.

    \b
    Examples:
      mergeforge extract-lora ./tuned --base org/model --rank 64 --out ./adapter
      mergeforge extract-lora ./tuned --base ./model --energy 0.95 --out ./lora
    """
    started = time.monotonic()
    from mergeforge.cli import _progress
    from mergeforge.lora import extract

    plan = extract.plan_extraction(tuned, base, out, **options)
    to = _progress.console()
    results = list(_watched(plan, extract.extract(plan), to, quiet=quiet))
    if as_json:
        click.echo(json.dumps(extract.read_report(plan)))
    if quiet or as_json:
        return
    _show(extract.make_report(plan, results), to, verbose=verbose)
    to.print(f"wrote {plan.out} in {time.monotonic() - started:.1f} s ({plan.dtype} factors)", markup=False)


def _watched(plan: Extraction, results: Iterable[PairResult], to: Console, *, quiet: bool) -> Iterator[PairResult]:
    """Pass the results on, with a bar on a terminal."""
    if quiet or not to.is_terminal:
        yield from results
        return
    from rich.progress import track

    yield from track(results, total=len(plan.tasks), console=to, description="tensors", transient=True)


def _show(report: ExtractionReport, to: Console, *, verbose: bool) -> None:
    """The report, with modules that differ only in their layer number as one row."""
    from rich.markup import escape

    from mergeforge.core.sizes import format_size
    from mergeforge.errors import format_list

    rows: list[tuple[str, ...]] = [("module", "count", "rank", "energy kept", "error |D-BA|/|D|")]
    for name, group in _groups(report.factored, verbose=verbose).items():
        columns = (_range([getattr(result, field) for result in group]) for field in ("rank", "energy", "error"))
        rows.append((name, str(len(group)), *columns))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        to.print("   ".join(cells).rstrip(), markup=False)
    to.print(f"error of all factors together: {100 * report.error:.4g} % of the change", markup=False)
    if report.saved:
        nbytes = sum(pair.tuned.info.nbytes for pair in report.saved.values())
        to.print(f"saved whole: {format_list(report.saved)} ({format_size(nbytes)})", markup=False)
    if left_out := sum(result.left_out for result in report.results):
        to.print(f"excluded by --include or --exclude: {left_out} tensors", markup=False)
    if report.not_held:
        to.print(f"[yellow]note[/]     the adapter does not contain {len(report.not_held)} changed tensors:")
        for result in report.not_held if verbose else report.not_held[:SHOWN]:
            norm, base_norm = result.norm, result.base_norm
            relative = f" (changed by {100 * norm / base_norm:.3g} %)" if norm is not None and base_norm else ""
            to.print(f"           {result.pair.name}{relative}: {result.pair.treatment}", markup=False)
        to.print(f"         it reproduces all but {100 * report.total_error:.4g} % of the change", markup=False)
    for note in report.notes:
        to.print(f"[yellow]note[/]     {escape(note)}")


def _groups(results: Sequence[PairResult], *, verbose: bool) -> dict[str, list[PairResult]]:
    groups: dict[str, list[PairResult]] = {}
    for result in results:
        parts = [part if not part.isdigit() else "*" for part in result.pair.module.split(".")]
        groups.setdefault(result.pair.module if verbose else ".".join(parts), []).append(result)
    return groups


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
