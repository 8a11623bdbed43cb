"""Options of `data`, `eval` and `compare` that say how rows are read."""

from __future__ import annotations

from collections.abc import Sequence

import click

from mergeforge.errors import RecipeError

FORMATS_HELP = "auto, messages, sharegpt, alpaca, prompt_response or text."
columns = click.option(
    "--columns", multiple=True, metavar="ROLE=COLUMN", help="Name a column, such as prompt=question (repeatable)."
)
system = click.option("--system", metavar="TEXT", help="System message for conversations without one.")


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """{role: column} of the --columns options. Raises RecipeError."""
    columns: dict[str, str] = {}
    for text in texts:
        role, equals, column = text.partition("=")
        if not (role and equals and column):
            raise RecipeError(f"--columns {text}: write ROLE=COLUMN, such as --columns prompt=question")
        columns[role.strip()] = column.strip()
    return columns
