"""Surveying: what rows hold, without a tokenizer. Lengths are of characters here."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergeforge.data.conversations import SURROGATE, BadRow, Conversation, EmptyRow, Passage
from mergeforge.data.counting import Counts, Tally, total_of
from mergeforge.data.formats import Format
from mergeforge.data.reading import Decision, OpenFile, decisions, open_files
from mergeforge.data.rows import Bad
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.splitting import held_out
from mergeforge.disk import disk_error
from mergeforge.errors import OutputError, RecipeError, SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIDES = ("train", "validation")


@dataclass(frozen=True)
class ReadRow:
    """A row that can be used: where it stands, what it holds, and what that is."""

    place: str
    value: Mapping[str, Any]
    content: Conversation | Passage


@dataclass(frozen=True)
class Split:
    """What was written: rows by side; the counts are of what was read."""

    counts: Counts
    written: Mapping[str, int]


@dataclass(frozen=True)
class Survey:
    """Counts with lengths in characters, and how each source is read."""

    counts: Counts
    decisions: tuple[Decision, ...]


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


def survey(settings: DataSettings) -> Survey:
    """Read all rows once. Raises SourceError and RecipeError."""
    parts = [_survey(source) for source in settings.sources]
    lengths, keys = _joined([one[1] for one in parts], "int64"), _joined([one[2] for one in parts], "uint64")
    counted: dict[str, Counts] = {}
    for source, (tally, length, key, _) in zip(settings.sources, parts, strict=True):
        counted[_free(source.path, counted)] = replace(tally.counts(length, 0, key), tokens=0)
    formats = [one for part in parts for one in part[3]]
    return Survey(replace(total_of(counted, lengths, keys), tokens=0), decisions(formats))


def prompts_of(settings: DataSettings, count: int) -> list[list[Mapping[str, Any]]]:
    """The messages before the last answer of the first `count` conversations: to ask a model before and after."""
    found: list[list[Mapping[str, Any]]] = []
    for source in settings.sources:
        for file in open_files(source):
            for row in read_file(file, Tally(), settings.system):
                messages = row.content.messages if isinstance(row.content, Conversation) else ()
                answers = [at for at, one in enumerate(messages) if one["role"] == "assistant" and at]
                if answers:
                    found.append(list(messages[: answers[-1]]))
                if len(found) == count:
                    return found
    return found


def split(source: DataSource, wanted: float | int, out: Path, *, seed: int = 0, overwrite: bool = False) -> Split:
    """Write `train.jsonl` and `validation.jsonl` into a folder: rows with all their columns, in their order.

    Rows that cannot be used are counted and left out. Raises OutputError for files that are there already.
    """
    files = {side: out / f"{side}.jsonl" for side in SIDES}
    if there := [str(path) for path in files.values() if path.exists() and not overwrite]:
        raise OutputError(f"{' and '.join(there)} exists", hint="--overwrite, or another --out")
    tally, lengths, keys, _ = _survey(source, seed)
    if not len(keys):
        raise SourceError(f"no row of {source.path} can be used")
    held = held_out(keys, wanted)
    try:
        out.mkdir(parents=True, exist_ok=True)
        parts = {side: Path(f"{path}.part") for side, path in files.items()}
        with (
            parts["train"].open("w", encoding="utf-8") as train,
            parts["validation"].open("w", encoding="utf-8") as val,
        ):
            _write_sides(source, held, train, val)
        for side in SIDES:
            os.replace(parts[side], files[side])
    except OSError as error:
        raise disk_error(error, str(out)) from error
    written = {"train": int((~held).sum()), "validation": int(held.sum())}
    return Split(replace(tally.counts(lengths, 0, keys), tokens=0), written)


def _write_sides(source: DataSource, held: NDArray[np.bool_], train: IO[str], validation: IO[str]) -> None:
    at = 0
    for file in open_files(source):
        for row in read_file(file, Tally()):
            if at == len(held):
                raise SourceError(f"{source.path} changed while it was read", hint="run again")
            (validation if held[at] else train).write(_line(row.value))
            at += 1


def _line(value: Mapping[str, Any]) -> str:
    """A row as a line of JSON; what is no UTF-8 text in it (in a column that is not used) is escaped."""
    line = json.dumps(value, ensure_ascii=False, default=str)
    return (json.dumps(value, default=str) if SURROGATE.search(line) else line) + "\n"


def _survey(
    source: DataSource, seed: int = 0
) -> tuple[Tally, NDArray[np.int64], NDArray[np.uint64], list[tuple[str, str, Format]]]:
    """(tally, characters and key of each row that can be used, formats)."""
    import numpy as np

    tally, lengths, keys, formats = Tally(), array("q"), array("Q"), []
    for file in open_files(source):
        formats.append((source.path, file.file.name, file.format))
        for row in read_file(file, tally):
            tally.kinds["used"] += 1
            lengths.append(_characters(row.content))
            keys.append(row.content.key(seed))
    return tally, np.asarray(lengths, np.int64), np.asarray(keys, np.uint64), formats


def _characters(content: Conversation | Passage) -> int:
    if isinstance(content, Passage):
        return len(content.text)
    return sum(len(str(message["content"])) for message in content.messages)


def _joined(parts: list[Any], kind: str) -> Any:
    import numpy as np

    if not parts:
        raise RecipeError("no data is named")
    return np.concatenate(parts).astype(kind)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name += " (again)"
    return name
