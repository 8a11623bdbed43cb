"""mergeforge run."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from mergeforge.cli import _options
from mergeforge.cli._options import merge_options


@click.command()
@click.argument("recipe")
@merge_options
@_options.fresh
@_options.overwrite
@click.option("--plan", "--dry-run", "plan_only", is_flag=True, help="Show the plan only, like `mergeforge plan`.")
def run(recipe: str, *, fresh: bool, overwrite: bool, plan_only: bool, **options: Any) -> None:
    """Do the merge that RECIPE describes.

    If it is interrupted or killed, run the same command again to resume.

    \b
    Examples:
      mergeforge run recipe.yaml --out merged --memory 2GiB
      mergeforge run recipe.yaml --set adapters.0.weight=0.5
    """
    if plan_only:
        from mergeforge.cli.plan import show_plan

        show_plan(recipe, **options)
        return
    _run(recipe, fresh=fresh, overwrite=overwrite, **options)


def _run(
    recipe: str, *, fresh: bool, overwrite: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    started = time.monotonic()
    from mergeforge import api

    planned = api.plan(recipe, **options)
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
        result = {"out": str(planned.out), "bytes": planned.nbytes_written, "seconds": round(seconds, 3)}
        click.echo(json.dumps(result | {"files": list(planned.files)}))
    elif not quiet:
        _result.show_result(planned, to, seconds)
