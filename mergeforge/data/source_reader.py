"""Reading: a source's files with their formats, decided from their first rows, and every row by that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from mergeforge.data.conversation import BadRow, Conversation, EmptyRow, Passage
from mergeforge.data.counts import Tally
from mergeforge.data.format_detection import detect
from mergeforge.data.formats import Format
from mergeforge.data.readers.open import Bad, Row, RowFile, files_of, rows_of
from mergeforge.data.settings import DataSource
from mergeforge.errors import SourceError

_LOOKED_AT = 100  # rows that decide the format of a file
_BAD_BEFORE = 1000  # things that are no rows before a file is given up


@dataclass(frozen=True)
class Decision:
    """How the rows of a source (or of some of its files) are read, and why."""

    source: str
    files: tuple[str, ...]
    format: str
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class OpenFile:
    """A file, its format, and its rows from the first on (once)."""

    source: DataSource
    file: RowFile
    format: Format
    rows: Iterator[Row | Bad]


@dataclass(frozen=True)
class ReadRow:
    """A row that can be used: where it stands, what it holds, and what that is."""

    place: str
    value: Mapping[str, Any]
    content: Conversation | Passage


def open_files(source: DataSource) -> Iterator[OpenFile]:
    """The files of a source, each opened when it is asked for; empty ones of several are passed over.

    Raises SourceError and RecipeError.
    """
    files = files_of(source)
    for file in files:
        rows = rows_of(source, file)
        first = list(_first(rows))
        whole = [row for row in first if isinstance(row, Row)]
        if not first and len(files) > 1:
            continue
        if not whole:
            said = f": {first[0].place}: {first[0].why}" if first and isinstance(first[0], Bad) else ""
            raise SourceError(f"{file.name} holds no rows{said}")
        yield OpenFile(source, file, detect([row.value for row in whole], source, file.name), chain(first, rows))


def _first(rows: Iterator[Row | Bad]) -> Iterator[Row | Bad]:
    good = 0
    for row in islice(rows, _LOOKED_AT + _BAD_BEFORE):
        good += isinstance(row, Row)
        yield row
        if good >= _LOOKED_AT:
            return


def read_file(file: OpenFile, tally: Tally, system: str | None = None) -> Iterator[ReadRow]:
    """The rows of a file that can be used; the others are counted."""
    for row in file.rows:
        if isinstance(row, Bad):
            tally.skip(row.place, "bad", row.why)
            continue
        try:
            content = file.format.read(row.value, system)
        except BadRow as error:
            tally.skip(row.place, "bad", str(error))
        except EmptyRow as error:
            tally.skip(row.place, "empty", str(error))
        else:
            yield ReadRow(row.place, row.value, content)


def decisions(opened: list[tuple[str, str, Format]]) -> tuple[Decision, ...]:
    """(source, file, format) of every file, those alike in one."""
    found: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[tuple[str, Format]]] = {}
    for source, file, format in opened:
        found.setdefault((source, format.name, tuple(format.columns.items())), []).append((file, format))
    return tuple(
        Decision(
            source,
            tuple(file for file, _ in alike),
            kind,
            dict(columns),
            tuple(sorted({name for _, one in alike for name in one.unused})),
            alike[0][1].why,
        )
        for (source, kind, columns), alike in found.items()
    )
