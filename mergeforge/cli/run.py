"""mergeforge run and mergeforge plan."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import click

OPTIONS = [
    click.option("--out", metavar="DIR", help="Where to write; overrides output.path."),
    click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Override a recipe key (repeatable)."),
    click.option(
        "--memory",
        metavar="SIZE",
        help="Working memory, e.g. 2GiB or 800MB (default: 2 GiB, or a quarter of what is free).",
    ),
    click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", show_default=True),
    click.option("--threads", type=int, metavar="N", help="Workers (default: the processors, as far as they fit)."),
    click.option("--stream-inputs", is_flag=True, help="Read Hub repos where they lie, without downloading them."),
    click.option(
        "--stream-to-hub",
        metavar="REPO_ID",
        help="Send each file to this Hub repo when it is finished, and remove it here.",
    ),
    click.option("--allow-pickle", is_flag=True, help="Read .bin weights, with torch's weights_only loader."),
    click.option("--allow-nonfinite", is_flag=True, help="Write infinite and NaN values instead of refusing."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, the rest on stderr."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Print the whole plan first."),
]


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("recipe")
@_options
@click.option("--fresh", is_flag=True, help="Throw an unfinished run of OUT away and start over.")
@click.option("--overwrite", is_flag=True, help="Replace a finished merge in OUT.")
@click.option("--plan", "only_plan", is_flag=True, help="The same as `mergeforge plan`.")
def run(recipe: str, *, fresh: bool, overwrite: bool, only_plan: bool, **options: Any) -> None:
    """Do the merge that RECIPE describes.

    Killed or interrupted, the same command goes on where it stopped.

    \b
    mergeforge run recipe.yaml --out merged --memory 2GiB
    mergeforge run recipe.yaml --set adapters.0.weight=0.5
    """
    if only_plan:
        _plan(recipe, **options)
        return
    _run(recipe, fresh=fresh, overwrite=overwrite, **options)


@click.command()
@click.argument("recipe")
@_options
def plan(recipe: str, **options: Any) -> None:
    """Show what run would do: inputs, every tensor's way, bytes, peak memory, disk, notes.

    Reads headers only; nothing is written.

    \b
    mergeforge plan recipe.yaml --memory 2GiB
    """
    _plan(recipe, **options)


def _made(recipe: str, sets: tuple[str, ...], options: dict[str, Any]) -> Any:
    from mergeforge.planner import make_plan, read_recipe

    sets = (*sets, *_streaming(read_recipe(recipe, sets), options))  # mistakes are told before torch is loaded
    names = ("out", "memory", "device", "threads", "allow_pickle", "allow_nonfinite")
    return make_plan(recipe, sets=sets, **{name: options[name] for name in names})


def _streaming(recipe: Any, options: dict[str, Any]) -> list[str]:
    """The recipe keys that --stream-inputs and --stream-to-hub stand for."""
    sets = ["stream_inputs=true"] if options["stream_inputs"] else []
    if repo := options["stream_to_hub"]:
        known = recipe.output.publish
        rest = {"private": known.private, "revision": known.revision} if known else {}
        sets.append("output.publish=" + json.dumps({"repo": repo, "stream": True, **rest}))
    return sets


def _plan(recipe: str, *, sets: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    made = _made(recipe, sets, options)
    from mergeforge.cli import _progress
    from mergeforge.planner import check_disk

    if as_json:
        click.echo(json.dumps(_progress.plan_facts(made), indent=1))
    elif not quiet:
        to = _progress.console(stderr=False)
        _progress.show_plan(made, to)
        if verbose:
            for piece in made.pieces:
                shape = "x".join(map(str, piece.info.shape))
                to.print(
                    f"  {piece.info.name}  {piece.info.dtype} {shape}: {made.actions[piece.info.name]}", markup=False
                )
    check_disk(made)


def _run(
    recipe: str,
    *,
    sets: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    fresh: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    started = time.monotonic()
    made = _made(recipe, sets, options)
    from mergeforge.cli import _progress
    from mergeforge.core.sizes import show_size
    from mergeforge.execute import executor
    from mergeforge.hub import publish

    to = _progress.console()
    if verbose:
        _progress.show_plan(made, to)
    elif not quiet:
        _progress.show_notes(made, to)
    if made.streams:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented

        disable_progress_bars()  # they would break into ours
    if made.recipe.output.publish:
        publish.check_access(made.recipe.output.publish.repo)  # before the work, not after it

    def say(text: str) -> None:
        if not quiet:
            to.print(text, markup=False)

    tiles = executor.run(made, fresh=fresh, overwrite=overwrite, tell=say)
    for _ in _progress.watch(made, tiles, to, quiet=quiet):
        pass
    seconds = time.monotonic() - started
    if (asked := made.recipe.output.publish) and not asked.stream:
        planned = publish.plan_publication(made.out, asked.repo, revision=asked.revision, private=asked.private)
        for done in publish.publish(planned):
            say(f"sent {done}")
    if as_json:
        facts = {
            "out": str(made.out),
            "bytes": made.nbytes_written,
            "seconds": round(seconds, 3),
            "files": list(made.files),
        }
        click.echo(json.dumps(facts))
    elif not quiet:
        where = asked.repo if asked and asked.stream else made.out
        to.print(f"wrote {show_size(made.nbytes_written)} to {where} in {seconds:.1f} s", markup=False)
