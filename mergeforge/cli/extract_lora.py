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
    to.print(f"wrote {out} in {time.monotonic() - started:.1f} s ({plan.dtype} factors)", markup=False)


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
    to.print(_counts(report), markup=False)
    if report.not_held:
        to.print(f"[yellow]note[/]     the adapter does not contain {_tensors(len(report.not_held))} that changed:")
        lines = list(_missing(report.not_held, verbose=verbose))
        for line in lines if verbose else lines[:SHOWN]:
            to.print(f"           {line}", markup=False)
        if len(lines) > SHOWN and not verbose:
            to.print(f"           and {len(lines) - SHOWN} more; -v lists every tensor", markup=False)
        to.print(f"         error of the whole adapter: {100 * report.total_error:.4g} % of the change", markup=False)
    for note in report.notes:
        to.print(f"[yellow]note[/]     {escape(note)}")


def _counts(report: ExtractionReport) -> str:
    """How many tensors there are, and what became of them; the parts add up to the whole."""
    factored = len(report.factored)
    parts = {
        "in factors": factored,
        "saved whole": len(report.saved),
        "changed, but not in the adapter": len(report.not_held),
        "excluded by --include or --exclude": sum(result.left_out for result in report.results),
    }
    parts["unchanged"] = len(report.results) - sum(parts.values())
    return f"{_tensors(len(report.results))}: " + ", ".join(f"{count} {what}" for what, count in parts.items() if count)


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _missing(results: Sequence[PairResult], *, verbose: bool) -> Iterator[str]:
    """A line for each tensor that the adapter lacks, or for those of all layers together."""
    groups: dict[tuple[str, str], list[PairResult]] = {}
    for result in results:
        name = result.pair.name if verbose else _pattern(result.pair.name)
        groups.setdefault((name, result.pair.treatment), []).append(result)
    for (name, treatment), group in groups.items():
        known = [result for result in group if result.norm is not None and result.base_norm]
        changes = [100 * result.norm / result.base_norm for result in known]  # type: ignore[operator]  # not None
        change = f"changed by {_range(changes, 3)} %" if changes else ""
        facts = [_tensors(len(group))] * (len(group) > 1) + [change] * bool(change)
        shown = group[0].pair.name if len(group) == 1 else name
        yield f"{shown} ({', '.join(facts)}): {treatment}" if facts else f"{shown}: {treatment}"


def _pattern(name: str) -> str:
    return ".".join(part if not part.isdigit() else "*" for part in name.split("."))


def _groups(results: Sequence[PairResult], *, verbose: bool) -> dict[str, list[PairResult]]:
    groups: dict[str, list[PairResult]] = {}
    for result in results:
        module = result.pair.module
        groups.setdefault(module if verbose else _pattern(module), []).append(result)
    return groups


def _range(values: Sequence[float], digits: int = 4) -> str:
    low, high = (f"{value:.{digits}g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
