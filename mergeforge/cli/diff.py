"""mergeforge diff."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from mergeforge.cli import _options


@click.command()
@click.argument("a")
@click.argument("b")
@_options.allow_pickle
@click.option("--json", "as_json", is_flag=True, help="Print every tensor as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="List equal tensors too.")
def diff(a: str, b: str, allow_pickle: bool, as_json: bool, verbose: bool) -> int:
    """Compare two checkpoints tensor by tensor. Exit code 0: same, 1: different.

    \b
    Examples:
      mergeforge diff ./base ./merged
      mergeforge diff ./merged ./merged/merged-Q8_0.gguf
    """
    from mergeforge import api

    differences = api.diff(a, b, allow_pickle=allow_pickle)
    different = [difference for difference in differences if not difference.same]
    if as_json:
        click.echo(json.dumps([asdict(difference) for difference in differences]))
        return int(bool(different))
    for difference in differences if verbose else different:
        size = f"  relative {difference.relative:.3g}, largest {difference.largest:.3g}" if difference.relative else ""
        click.echo(f"{difference.name}: {difference.what}{size}")
    click.echo(f"{len(differences) - len(different)} of {len(differences)} tensors are the same")
    return int(bool(different))
