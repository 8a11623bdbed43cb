"""The files of a data source, and the records of each file by its suffix."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.data.readers.base import Record, UnreadableRecord, as_record, data_suffix
from mergeforge.data.readers.hub import hub_files
from mergeforge.data.readers.json import read_json, read_jsonl
from mergeforge.data.readers.tables import read_csv, read_parquet
from mergeforge.data.readers.text import read_text
from mergeforge.data.settings import DataSource
from mergeforge.errors import RecipeError, SourceError, did_you_mean, format_list

SAMPLES = Path(__file__).parents[1] / "samples"
READERS: dict[str, Any] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}
SUFFIXES = tuple(READERS)


@dataclass(frozen=True)
class DataFile:
    """A file of records: its name for messages, and its path (None: a Python list)."""

    name: str
    path: Path | None


def source_files(source: DataSource) -> list[DataFile]:
    """The files of a source, in reading order. Raises SourceError if there are none."""
    if source.rows is not None:
        return [DataFile(source.path, None)]
    if source.path.startswith("sample:"):
        return [DataFile(source.path, sample_path(source.path.removeprefix("sample:")))]
    if source.path.startswith("hf://"):
        return [DataFile(name, path) for name, path in hub_files(source.path)]
    return [DataFile(str(path), path) for path in _local_files(source.path)]


def sample_path(name: str) -> Path:
    """The file of a data set that comes with the package. Raises RecipeError."""
    known = sorted(path.stem for path in SAMPLES.glob("*.jsonl"))
    if name not in known:
        hint = did_you_mean(name, known) or ", ".join(f"sample:{stem}" for stem in known)
        raise RecipeError(f"there is no sample '{name}'", hint=hint)
    return SAMPLES / f"{name}.jsonl"


def read_records(source: DataSource, file: DataFile) -> Iterator[Record | UnreadableRecord]:
    """The records of one file of a source. Raises SourceError for a file that cannot be read at all."""
    if file.path is None:
        for index, value in enumerate(source.rows or ()):
            yield as_record(value, f"{file.name}[{index}]")
        return
    reader = READERS.get(data_suffix(file.path), read_text)
    try:
        yield from reader(file.path, file.name)
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz raises the last two
        reason = (error.strerror if isinstance(error, OSError) else "") or error
        raise SourceError(f"{file.name} cannot be read: {reason}") from None


def _local_files(path: str) -> list[Path]:
    try:
        local = Path(path).expanduser()
        if local.is_dir():
            return _files_in_folder(local)
        if local.exists():
            return [_with_known_suffix(local)]
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if any(wildcard in path for wildcard in "*?["):
        matches = Path(local.anchor).glob(str(local.relative_to(local.anchor)))
        files = sorted(match for match in matches if match.is_file() and not match.name.startswith("."))
        if not files:
            raise SourceError(f"no file matches {path}")
        return [_with_known_suffix(file) for file in files]
    hint = "for a data set on the Hub write hf://owner/name" if path.count("/") == 1 and "." not in path else ""
    raise SourceError(
        f"there is no data at {path}", hint=hint or "give a file, folder, glob, hf://owner/name or sample:chat"
    )


def _with_known_suffix(path: Path) -> Path:
    if data_suffix(path) not in SUFFIXES:
        raise SourceError(f"{path}: '{path.suffix}' files are not supported", hint=f"supported: {', '.join(SUFFIXES)}")
    return path


def _files_in_folder(folder: Path) -> list[Path]:
    """Every file in a folder that may hold records, without hidden files and READMEs."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    data = [path for path in visible if data_suffix(path) in SUFFIXES and not path.name.lower().startswith("readme")]
    if not data:
        names = format_list(path.name for path in visible) or "nothing"
        raise SourceError(f"{folder} holds no data (it holds: {names})", hint=f"supported: {', '.join(SUFFIXES)}")
    return data
