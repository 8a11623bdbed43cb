"""mergeforge diff."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mergeforge.cli import _options

if TYPE_CHECKING:
    from mergeforge.operations.diff import TensorDifference
    from mergeforge.operations.diff_groups import DifferenceGroup

SHOWN = 20  # rows of a table before "and more"


@click.command()
@click.argument("a")
@click.argument("b")
@_options.allow_pickle
@click.option("--json", "as_json", is_flag=True, help="Print every tensor as JSON.")
@click.option("--all", "every", is_flag=True, help="List every tensor instead of modules and layers.")
@click.option("-v", "--verbose", is_flag=True, help="With --all: equal tensors too.")
def diff(a: str, b: str, allow_pickle: bool, as_json: bool, every: bool, verbose: bool) -> int:
    """Compare two checkpoints. Exit code 0: same, 1: different.

    Lists modules and layers, the largest changes first. `relative` is the norm of the difference, divided by that of A.

    \b
    Examples:
      mergeforge diff ./base ./merged
      mergeforge diff ./merged ./merged/merged-Q8_0.gguf --all
    """
    from mergeforge import api

    differences = api.diff(a, b, allow_pickle=allow_pickle)
    different = [difference for difference in differences if not difference.same]
    if as_json:
        click.echo(json.dumps([asdict(difference) for difference in differences]))
        return int(bool(different))
    lines = _every_tensor(differences if verbose else different) if every or verbose else _groups(differences)
    for line in lines:
        click.echo(line)
    click.echo(f"{len(differences) - len(different)} of {len(differences)} tensors are the same")
    return int(bool(different))


def _every_tensor(differences: Sequence[TensorDifference]) -> Iterator[str]:
    """A line for each tensor: first those that cannot be compared, then the largest changes."""
    for difference in sorted(differences, key=lambda difference: (_is_compared(difference), -difference.relative)):
        size = f"  relative {difference.relative:.3g}, largest {difference.largest:.3g}" if difference.relative else ""
        yield f"{difference.name}: {difference.what}{size}"


def _groups(differences: Sequence[TensorDifference]) -> Iterator[str]:
    from mergeforge.operations.diff_groups import by_layer, by_module

    yield from _other_differences(differences)
    compared = [difference for difference in differences if difference.norm or difference.change or difference.same]
    yield from _table("module", by_module(compared))
    layers = by_layer(compared)
    if len(layers) > 1:
        yield from _table("layer", layers)


def _other_differences(differences: Sequence[TensorDifference]) -> Iterator[str]:
    """Tensors that are missing, or of another shape or dtype; those of several layers on one line."""
    from mergeforge.operations.diff_groups import pattern

    groups: dict[tuple[str, str], list[str]] = {}
    for difference in differences:
        if not _is_compared(difference):
            groups.setdefault((pattern(difference.name), difference.what), []).append(difference.name)
    for (name, what), names in list(groups.items())[:SHOWN]:
        yield f"{names[0]}: {what}" if len(names) == 1 else f"{name}: {what} ({len(names)} tensors)"
    if len(groups) > SHOWN:
        yield f"and {len(groups) - SHOWN} more like these; --all lists every tensor"
    if groups:
        yield ""


def _is_compared(difference: TensorDifference) -> bool:
    return difference.same or difference.what == "values differ"


def _table(head: str, groups: Sequence[DifferenceGroup]) -> Iterator[str]:
    if not groups:
        return
    yield f"{'relative':>10}  {'largest':>10}  {'different':>12}  {head}"
    for group in groups[:SHOWN]:
        count = f"{group.different} of {len(group.tensors)}"
        yield f"{group.relative:10.3g}  {group.largest:10.3g}  {count:>12}  {group.name}"
    if len(groups) > SHOWN:
        yield f"and {len(groups) - SHOWN} more; --all lists every tensor"
    yield ""
