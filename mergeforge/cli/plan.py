"""mergeforge plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from mergeforge.cli._mergekit_flags import mergekit_flags, without_mergekit_flags
from mergeforge.cli._options import merge_options
from mergeforge.cli._recipe import read_recipe
from mergeforge.cli._text import say


@click.command()
@click.argument("recipe")
@mergekit_flags
@merge_options
def plan(recipe: str, **options: Any) -> None:
    """Show what `mergeforge run` would do; reads headers only, writes nothing.

    Prints the inputs, what is done to every tensor and by what, bytes to read and write, peak memory, disk space and
    notes.

    \b
    Examples:
      mergeforge plan recipe.yaml
      mergeforge plan recipe.yaml --memory 2GiB -v
    """
    options, notes = without_mergekit_flags(recipe, options)
    for note in () if options["quiet"] else notes:
        say("note     ", note, "yellow")
    show_plan(recipe, **options)


def show_plan(recipe: str | Mapping[str, Any], *, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Plan a merge and print the plan. Raises BudgetError if the disk is too small."""
    read_recipe(recipe, options["sets"])  # a mistake is reported before the planner is imported
    from mergeforge import api
    from mergeforge.planner import check_disk, plan_as_json

    planned = api.plan(recipe, **options)
    if as_json:
        click.echo(json.dumps(plan_as_json(planned), indent=1))
    elif not quiet:
        from mergeforge.cli import _progress

        to = _progress.console(stderr=False)
        _progress.show_plan(planned, to)
        for tensor_plan in planned.tensor_plans if verbose else ():
            info = tensor_plan.info
            shape = "x".join(map(str, info.shape))
            action = f"{planned.summaries[info.name]} ({tensor_plan.backend.label})"
            to.print(f"  {info.name}  {info.dtype} {shape}: {action}", markup=False)
    check_disk(planned)
