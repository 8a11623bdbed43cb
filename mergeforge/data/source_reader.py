"""Reads a source: its files, the format of each from its first rows, and every row in that format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from mergeforge.data.conversation import Conversation, EmptyRecord, InvalidRecord, TextSample
from mergeforge.data.counts import RecordCounter
from mergeforge.data.format_detection import detect
from mergeforge.data.formats import Format
from mergeforge.data.preference import PreferenceSample
from mergeforge.data.readers.base import Record, UnreadableRecord
from mergeforge.data.readers.open import DataFile, read_records, source_files
from mergeforge.data.settings import DataSource
from mergeforge.errors import SourceError

_DETECTION_ROWS = 100  # rows that decide the format of a file
_MAX_UNREADABLE = 1000  # unreadable records at the start before a file is given up


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
    """A file, its format, and an iterator over all of its rows."""

    source: DataSource
    file: DataFile
    format: Format
    rows: Iterator[Record | UnreadableRecord]


@dataclass(frozen=True)
class ParsedRecord:
    """A usable row: its place, its columns, its content, and how much it counts in the loss."""

    place: str
    value: Mapping[str, Any]
    content: Conversation | TextSample | PreferenceSample
    weight: float = 1.0


def open_files(source: DataSource) -> Iterator[OpenFile]:
    """The files of a source, each opened when it is reached; empty files among several are skipped.

    Raises SourceError and RecipeError.
    """
    files = source_files(source)
    for file in files:
        rows = read_records(source, file)
        first = list(_first_rows(rows))
        readable = [row for row in first if isinstance(row, Record)]
        if not first and len(files) > 1:
            continue
        if not readable:
            reason = f": {first[0].place}: {first[0].why}" if first and isinstance(first[0], UnreadableRecord) else ""
            raise SourceError(f"{file.name} holds no rows{reason}")
        format = detect([row.value for row in readable], source, file.name)
        yield OpenFile(source, file, format, chain(first, rows))


def _first_rows(rows: Iterator[Record | UnreadableRecord]) -> Iterator[Record | UnreadableRecord]:
    readable = 0
    for row in islice(rows, _DETECTION_ROWS + _MAX_UNREADABLE):
        readable += isinstance(row, Record)
        yield row
        if readable >= _DETECTION_ROWS:
            return


def parse_file(file: OpenFile, counter: RecordCounter, system: str | None = None) -> Iterator[ParsedRecord]:
    """The usable rows of a file; the others are counted as skipped."""
    for row in file.rows:
        if isinstance(row, UnreadableRecord):
            counter.skip(row.place, "bad", row.why)
            continue
        try:
            content = file.format.read(row.value, system)
        except InvalidRecord as error:
            counter.skip(row.place, "bad", str(error))
        except EmptyRecord as error:
            counter.skip(row.place, "empty", str(error))
        else:
            yield ParsedRecord(row.place, row.value, content, file.format.weight(row.value))


def merge_decisions(formats: list[tuple[str, str, Format]]) -> tuple[Decision, ...]:
    """One decision per group of equal (source, file, format)."""
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[tuple[str, Format]]] = {}
    for source, file, format in formats:
        groups.setdefault((source, format.name, tuple(format.columns.items())), []).append((file, format))
    return tuple(
        Decision(
            source,
            tuple(file for file, _ in group),
            format_name,
            dict(columns),
            tuple(sorted({name for _, format in group for name in format.unused})),
            group[0][1].why,
        )
        for (source, format_name, columns), group in groups.items()
    )
