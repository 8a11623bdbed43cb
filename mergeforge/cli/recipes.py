"""mergeforge recipes: the recipes that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from mergeforge.errors import OutputError, RecipeError, did_you_mean

FOLDER = Path(__file__).parents[1] / "recipe" / "shipped"  # a link to recipes/ in a checkout, a folder in a wheel
SUMMARY = "# "  # a recipe's first line is a comment that says what it is for


@click.group()
def recipes() -> None:
    """List, show or copy the recipes that come with mergeforge.

    \b
    Examples:
      mergeforge recipes ls
      mergeforge recipes show ties
      mergeforge recipes cp ties recipe.yaml
    """


@recipes.command("ls")
def recipes_ls() -> None:
    """List the recipes and what each is for.

    \b
    Examples:
      mergeforge recipes ls
    """
    for name, path in shipped_recipes().items():
        summary = path.read_text(encoding="utf-8").split("\n", 1)[0]
        click.echo(f"{name:18} {summary.removeprefix(SUMMARY)}")


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print a recipe.

    \b
    Examples:
      mergeforge recipes show ties
    """
    click.echo(_find(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("cp")
@click.argument("name")
@click.argument("file", default="")
def recipes_cp(name: str, file: str) -> None:
    """Copy a recipe to FILE (default: NAME.yaml).

    \b
    Examples:
      mergeforge recipes cp ties
      mergeforge recipes cp ties recipe.yaml
    """
    copy_recipe(name, Path(file or f"{name}.yaml"))


def shipped_recipes() -> Mapping[str, Path]:
    """The recipes by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def copy_recipe(name: str, target: Path) -> None:
    """Copy a recipe to a new file. Raises RecipeError for an unknown name, OutputError if the file exists."""
    text = _find(name).read_text(encoding="utf-8")
    if target.exists():
        raise OutputError(f"{target} exists", hint="name another file")
    target.write_text(text, encoding="utf-8")
    click.echo(f"wrote {target}; {_next_command(name, text)} {target}")


def _next_command(name: str, text: str) -> str:
    """What to do with a copied recipe: a training run has `data:`, and the demos run as they are."""
    is_training = any(line.startswith("data:") for line in text.splitlines())
    command = "mergeforge train" if is_training else "mergeforge plan"
    return f"next: {command}" if name.endswith("demo") else f"edit its paths, then: {command}"


def _find(name: str) -> Path:
    paths = shipped_recipes()
    if name not in paths:
        hint = did_you_mean(name, paths) or "known: " + ", ".join(paths)
        raise RecipeError(f"there is no recipe named '{name}'", hint=hint)
    return paths[name]
