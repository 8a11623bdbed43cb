"""mergeforge run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import click

from mergeforge.cli import _options
from mergeforge.cli._mergekit_flags import mergekit_flags, without_mergekit_flags
from mergeforge.cli._options import merge_options
from mergeforge.cli._recipe import read_recipe
from mergeforge.cli._text import say


@click.command()
@click.argument("recipe")
@mergekit_flags
@merge_options
@_options.fresh
@_options.overwrite
@_options.plan_only
def run(recipe: str, *, fresh: bool, overwrite: bool, plan_only: bool, **options: Any) -> None:
    """Do the merge that RECIPE describes, and write it to OUT, --out or the recipe's output.path.

    If it is interrupted or killed, run the same command again to resume. The options of mergekit-yaml work too:
    recipes/README.md lists what each does.

    \b
    Examples:
      mergeforge run recipe.yaml --out merged --memory 2GiB
      mergeforge run recipe.yaml --set adapters.0.weight=0.5
      mergeforge run mergekit-config.yml ./merged --cuda
    """
    options, notes = without_mergekit_flags(recipe, options)
    for note in () if options["quiet"] else notes:
        say("note     ", note, "yellow")
    if plan_only:
        from mergeforge.cli.plan import show_plan

        show_plan(recipe, **options)
        return
    run_recipe(recipe, fresh=fresh, overwrite=overwrite, **options)


def run_recipe(
    recipe: str | Mapping[str, Any],
    *,
    fresh: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Plan and run a merge, with its progress and its result on the terminal."""
    started = time.monotonic()
    read_recipe(recipe, options["sets"])  # a mistake is reported before the planner is imported
    from mergeforge import api
    from mergeforge.planner import Options, make_plan

    planned = make_plan(recipe, Options.of("mergeforge run", options))
    from mergeforge.cli import _progress, _result  # only now: a mistake in the recipe is reported sooner

    to = _progress.console()
    if verbose:
        _progress.show_plan(planned, to)
    elif not quiet:
        _progress.show_notes(planned, to)
    if planned.streams:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented

        disable_progress_bars()  # they would interrupt ours

    def on_message(text: str) -> None:
        if not quiet:
            to.print(text, markup=False)

    tiles = api.iter_run(planned, fresh=fresh, overwrite=overwrite, on_message=on_message)
    for _ in _progress.watch(planned, tiles, to, quiet=quiet, fresh=fresh):
        pass
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps(_result.result_as_json(planned, seconds)))
    elif not quiet:
        _result.show_result(planned, to, seconds)
