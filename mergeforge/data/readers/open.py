"""Rows: where they come from, one at a time, each with the file and line that it stands in.

What cannot be read as a row is a Bad one; it is counted and shown, not left out in silence. Nothing is
held but the row at hand, so files may be larger than memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.data.settings import DataSource
from mergeforge.errors import RecipeError, SourceError, did_you_mean, listing

SAMPLES = Path(__file__).parent / "samples"
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
LONGEST_ROW = 1 << 26  # characters; what is longer is no row but a broken file


@dataclass(frozen=True)
class Row:
    """A row and its place: `train.jsonl:17`, `train.parquet row 17`, `list[17]`."""

    value: Mapping[str, Any]
    place: str


@dataclass(frozen=True)
class Bad:
    """What could not be read, and why."""

    place: str
    why: str


@dataclass(frozen=True)
class RowFile:
    """A file of rows: what it is called, and where it lies (None: a Python list)."""

    name: str
    path: Path | None


def files_of(source: DataSource) -> list[RowFile]:
    """The files of a source, in the order in which they are read. Raises SourceError when there are none."""
    if source.rows is not None:
        return [RowFile(source.path, None)]
    if source.path.startswith("sample:"):
        return [RowFile(source.path, sample(source.path.removeprefix("sample:")))]
    if source.path.startswith("hf://"):
        from mergeforge.data.readers.hub import hub_files

        return [RowFile(name, path) for name, path in hub_files(source.path)]
    return [RowFile(str(path), path) for path in _local(source.path)]


def sample(name: str) -> Path:
    """One of the data sets that come with the package. Raises RecipeError."""
    known = sorted(path.stem for path in SAMPLES.glob("*.jsonl"))
    if name not in known:
        hint = did_you_mean(name, known) or ", ".join(f"sample:{one}" for one in known)
        raise RecipeError(f"there is no sample '{name}'", hint=hint)
    return SAMPLES / f"{name}.jsonl"


def rows_of(source: DataSource, file: RowFile) -> Iterator[Row | Bad]:
    """The rows of one file of a source. Raises SourceError for a file that cannot be read at all."""
    if file.path is None:
        for at, value in enumerate(source.rows or ()):
            yield row_of(value, f"{file.name}[{at}]")
        return
    ending = ending_of(file.path)
    try:
        yield from _reader(ending)(file.path, file.name)
    except (OSError, EOFError, zlib.error) as error:  # the last two of a damaged .gz
        said = (error.strerror if isinstance(error, OSError) else "") or error
        raise SourceError(f"{file.name} cannot be read: {said}") from None


def _reader(ending: str) -> Any:
    if ending in (".json", ".jsonl", ".ndjson"):
        from mergeforge.data.readers import json

        return json.read_json if ending == ".json" else json.read_jsonl
    if ending in (".csv", ".tsv"):
        from mergeforge.data.readers.tables import read_csv

        return read_csv
    if ending == ".parquet":
        from mergeforge.data.readers.tables import read_parquet

        return read_parquet
    from mergeforge.data.readers.text import read_text

    return read_text


def row_of(value: Any, place: str) -> Row | Bad:
    """A value as a row: a mapping, a list of messages, or plain text."""
    if isinstance(value, Mapping):
        return Row(value, place)
    if isinstance(value, str):
        return Row({"text": value}, place)
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return Row({"messages": value}, place)
    return Bad(place, f"a row must be a mapping, not {kind_of(value)}")


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "text" if isinstance(value, str) else f"{value!r}"[:40]


def ending_of(path: Path) -> str:
    """The file's ending, without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _local(path: str) -> list[Path]:
    try:
        here = Path(path).expanduser()
        if here.is_dir():
            return _in_folder(here)
        if here.exists():
            return [_known(here)]
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if any(sign in path for sign in "*?["):
        matches = Path(here.anchor).glob(str(here.relative_to(here.anchor)))
        found = sorted(path for path in matches if path.is_file() and not path.name.startswith("."))
        if not found:
            raise SourceError(f"no file matches {path}")
        return [_known(one) for one in found]
    hint = "data of the Hub is written hf://owner/name" if path.count("/") == 1 and "." not in path else ""
    raise SourceError(f"there is no data {path}", hint=hint or "a file, folder, glob, hf://owner/name or sample:chat")


def _known(path: Path) -> Path:
    if ending_of(path) not in ENDINGS:
        raise SourceError(f"{path}: no rows are read from '{path.suffix}' files", hint=f"known: {', '.join(ENDINGS)}")
    return path


def _in_folder(folder: Path) -> list[Path]:
    """Every file of a folder that may hold rows; hidden ones and READMEs do not."""
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [path for path in shown if ending_of(path) in ENDINGS and not path.name.lower().startswith("readme")]
    if not found:
        held = listing(path.name for path in shown) or "nothing"
        raise SourceError(f"{folder} holds no data (it holds: {held})", hint=f"known endings: {', '.join(ENDINGS)}")
    return found
