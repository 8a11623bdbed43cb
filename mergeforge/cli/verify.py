"""mergeforge verify."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from mergeforge.errors import SourceError, format_list

SHOWN = 20  # problems listed before "and more"


@click.command()
@click.argument("folder")
@click.option("--deep", is_flag=True, help="Also recompute a sample of tensors from the inputs.")
@click.option("--all", "everything", is_flag=True, help="With --deep: recompute all tensors, not a sample.")
@click.option("--engine", is_flag=True, help="Also load each GGUF in llama.cpp and compare it with transformers.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def verify(folder: str, deep: bool, everything: bool, engine: bool, as_json: bool) -> None:
    """Check FOLDER against its receipt: sizes, headers and every tensor's checksum.

    \b
    Examples:
      mergeforge verify merged --deep
      mergeforge verify merged --engine
    """
    from mergeforge import api

    verdict = api.verify(folder, deep=deep, everything=everything)
    if as_json:
        click.echo(json.dumps({"ok": verdict.ok} | asdict(verdict)))
    if not verdict.ok:
        problems = "\n".join(f"  {problem}" for problem in verdict.problems[:SHOWN])
        more = f"\n  and {len(verdict.problems) - SHOWN} more" if len(verdict.problems) > SHOWN else ""
        raise SourceError(f"{folder} does not match its receipt:\n{problems}{more}", hint="run the merge again")
    if not as_json:
        recomputed = f", {verdict.recomputed} recomputed" if verdict.recomputed else ""
        for warning in verdict.warnings:
            click.secho(f"warning: {warning}", fg="yellow", err=True)
        click.echo(f"{folder}: {verdict.tensors} tensors in {verdict.files} files match the receipt{recomputed}")
    if engine:
        _compare_in_engine(folder)


def _compare_in_engine(folder: str) -> None:
    from mergeforge.operations.compare_engine import compare_in_engine

    comparisons = compare_in_engine(folder, lambda text: click.echo(text, err=True))
    for comparison in comparisons:
        token = "same" if comparison.same_top_token else "different"
        difference = f"largest difference {comparison.max_difference:.4f}, KL {comparison.kl_divergence:.2g}"
        click.echo(f"{comparison.file}: {difference}, {token} most likely token", err=True)
    if bad := [comparison.file for comparison in comparisons if not comparison.ok]:
        raise SourceError(f"{format_list(bad)}: differs from transformers by more than its type explains")
