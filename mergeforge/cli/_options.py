"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

memory = click.option(
    "--memory", metavar="SIZE", help="Working memory, e.g. 2GiB or 800MB. [default: 2GiB, or a quarter of what is free]"
)
device = click.option(
    "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", show_default=True
)
threads = click.option(
    "-j", "--threads", type=int, metavar="N", help="Number of workers. [default: one per core, if they fit]"
)
allow_pickle = click.option("--allow-pickle", is_flag=True, help="Read .bin weights with torch's weights_only loader.")
fresh = click.option("--fresh", is_flag=True, help="Discard an unfinished run and start over.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace a finished result.")
plan_only = click.option("--plan", "--dry-run", "plan_only", is_flag=True, help="Show the plan only; write nothing.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
verbose = click.option("-v", "--verbose", is_flag=True, help="Print the whole plan first.")
set_keys = click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Override a key (repeatable).")


def options(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several options as one decorator, listed in --help in this order."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


resources = options(memory, device, threads)
merge_options = options(
    click.option("-o", "--out", metavar="DIR", help="Output folder; overrides output.path."),
    set_keys,
    resources,
    click.option("--stream-inputs", is_flag=True, help="Read Hub repos in place, without downloading them."),
    click.option(
        "--stream-to-hub", metavar="REPO_ID", help="Upload each finished file to this Hub repo and remove it here."
    ),
    allow_pickle,
    click.option("--strict", is_flag=True, help="Make warnings errors (exit code 3)."),
    click.option("--allow-nonfinite", is_flag=True, help="Write infinite and NaN values instead of refusing them."),
    as_json,
    quiet,
    verbose,
)
