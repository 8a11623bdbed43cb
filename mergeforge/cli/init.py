"""mergeforge init."""

from __future__ import annotations

from pathlib import Path

import click

from mergeforge.cli.recipes import copy_recipe


@click.command()
@click.argument("file", default="recipe.yaml")
@click.option(
    "--template",
    default="three_adapters",
    metavar="NAME",
    help="A name from `mergeforge recipes ls`.",
    show_default=True,
)
def init(file: str, template: str) -> None:
    """Write a commented recipe to start from.

    \b
    Examples:
      mergeforge init
      mergeforge init --template ties recipe.yaml
    """
    copy_recipe(template, Path(file))
