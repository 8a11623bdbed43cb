"""What every reader yields: records with the file and line they come from, one at a time.

Whatever cannot be read as a record becomes an UnreadableRecord. It is counted and shown, never dropped silently. Only
the current record is in memory, so a file may be larger than memory.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mergeforge.errors import SourceError

MAX_RECORD_CHARS = 1 << 26  # anything longer is a broken file, not a record


@dataclass(frozen=True)
class Record:
    """A row of data and its place: `train.jsonl:17`, `train.parquet row 17`, `list[17]`."""

    value: Mapping[str, Any]
    place: str


@dataclass(frozen=True)
class UnreadableRecord:
    """A place where no record could be read, and why."""

    place: str
    why: str


def as_record(value: Any, place: str) -> Record | UnreadableRecord:
    """A parsed value as a record: a mapping, a list of messages, or plain text."""
    if isinstance(value, Mapping):
        return Record(value, place)
    if isinstance(value, str):
        return Record({"text": value}, place)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return Record({"messages": value}, place)
    return UnreadableRecord(place, f"a row must be a mapping, not {type_name(value)}")


def is_message(value: Any) -> bool:
    """Whether a value is a message rather than a record: it has a role and a content."""
    keys = {str(key).lower() for key in value} if isinstance(value, Mapping) else set()
    return bool(keys & {"role", "from"}) and bool(keys & {"content", "value"})


def type_name(value: Any) -> str:
    """The type of a value, for a message; a short repr for anything else."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "text" if isinstance(value, str) else f"{value!r}"[:40]


def data_suffix(path: Path) -> str:
    """The suffix of a file in lower case, without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file (.gz too) as UTF-8 text, with or without a byte order mark. Raises SourceError for UTF-16.

    Bytes that are not UTF-8 become lone surrogates, so that only the records that contain them are rejected.
    """
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    raw = opener(path, "rb")
    start = raw.peek(2)[:2]
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raw.close()
        raise SourceError(f"{path} is UTF-16", hint="save it as UTF-8")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
