"""Text for the terminal: wrapped between words, never inside one, so that names and paths can be copied."""

from __future__ import annotations

import shutil
import sys
import textwrap

import click


def say(label: str, text: str, color: str) -> None:
    """Print a labeled text on stderr, its further lines indented; wrapped to the width of a terminal."""
    first, *rest = wrapped(text, indent=len(label)).split("\n")
    click.secho(label, fg=color, bold=color == "red" or None, nl=False, err=True)
    click.echo("\n".join([first, *rest]), err=True)


def wrapped(text: str, *, indent: int) -> str:
    """A text whose first line begins at column `indent`; unchanged where stderr is no terminal."""
    if not sys.stderr.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    lines = text.split("\n")
    return "\n".join(_wrapped_line(line, width, indent if index == 0 else 0) for index, line in enumerate(lines))


def _wrapped_line(line: str, width: int, begin: int) -> str:
    own = len(line) - len(line.lstrip())
    following = " " * (begin or own + 2)
    result = textwrap.fill(
        line.strip(),
        width,
        initial_indent=" " * (begin or own),
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return result[begin:]
