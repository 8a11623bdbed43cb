"""Every error that a user can meet, drawn as a tree.

    MergeforgeError            1   anything else
    ├── RecipeError            2   the recipe, or how a command was used
    ├── SourceError            3   an input is missing, corrupt, mismatched or refused
    ├── BudgetError            4   memory or disk
    ├── OutputError            5   another merge lives in the output folder, or another run holds it
    └── MissingExtraError      6   an optional dependency is not installed

Each says what is wrong, with which tensor, file or recipe line, and `hint` says what to do.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches


class MergeforgeError(Exception):
    """What went wrong (`str(error)`), what to do about it (`hint`), and the process's `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake in a recipe: 1-based line and column (0: not in the file), text and hint."""

    line: int
    column: int
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"line {self.line}, column {self.column}: " if self.line else ""
        return f"{place}{self.message}" + (f" ({self.hint})" if self.hint else "")


class RecipeError(MergeforgeError):
    """All mistakes of a recipe at once: `problems`, in the order of the file."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join([message, *(f"  {problem}" for problem in problems)]), hint=hint)
        self.problems = tuple(problems)


class SourceError(MergeforgeError):
    """An input is missing, corrupt, mismatched or refused."""

    exit_code = 3


class BudgetError(MergeforgeError):
    """The merge does not fit in the memory or on the disk that it is given."""

    exit_code = 4


class OutputError(MergeforgeError):
    """The output folder holds another merge, is held by another run, or is an input."""

    exit_code = 5


class MissingExtraError(MergeforgeError):
    """An optional dependency is not installed; the hint is the pip line."""

    exit_code = 6


def out_of_memory(error: BaseException, what: str = "") -> BudgetError | None:
    """A BudgetError for Python's and torch's ways to run out of memory (at `what`) or threads; None for any other."""
    said = str(error).strip()
    words = ("alloc", "out of memory", "can't start new thread")
    if not isinstance(error, MemoryError) and not any(word in said for word in words):
        return None
    why = f" ({said.splitlines()[0][:120]})" if said else ""
    text = f"{what}: " if what else ""
    return BudgetError(f"{text}the system has no more memory{why}", hint="give less with --memory, or fewer --threads")


# What code trips over that meets a list, a text or a huge number where a file should hold something else.
ODD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error)


@contextmanager
def refused_if_odd(what: object) -> Iterator[None]:
    """What trips over the odd form of a file from somewhere, as a SourceError that names it."""
    try:
        yield
    except ODD as error:
        text = f"{what} is not of the form that is expected: {type(error).__name__}: {str(error)[:200]}"
        raise SourceError(text, hint="download it again; if transformers reads it, report this") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'weight'?`, or nothing when no known word is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else ""


def listing(names: Iterable[str], limit: int = 5) -> str:
    """At most `limit` names for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
