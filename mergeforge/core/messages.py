"""Lines of text for the user: notes, warnings, and the progress of a long operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

OnMessage = Callable[[str], None]
"""Called with one line of text about the progress of a long operation."""


class WarningText(str):
    """A note on a result that is legal but probably not what the user meant; `--strict` makes it an error."""

    __slots__ = ()


def warnings_in(notes: Iterable[str]) -> tuple[str, ...]:
    """Those of the notes that are warnings, each once."""
    return tuple(dict.fromkeys(note for note in notes if isinstance(note, WarningText)))


def without_warnings(notes: Iterable[str]) -> tuple[str, ...]:
    """Those of the notes that are not warnings, each once."""
    return tuple(dict.fromkeys(note for note in notes if not isinstance(note, WarningText)))
