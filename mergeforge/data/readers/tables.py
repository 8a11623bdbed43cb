"""Records of CSV, TSV and Parquet files, streamed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from mergeforge.data.readers.base import MAX_RECORD_CHARS, Record, UnreadableRecord, open_text
from mergeforge.errors import MissingExtraError, SourceError, format_list, pip_install

_BATCH = 256  # Parquet rows in memory at once


def read_csv(path: Path, name: str) -> Iterator[Record | UnreadableRecord]:
    """One record per row; the header line names the columns and decides the separator: comma, semicolon, tab or |."""
    csv.field_size_limit(MAX_RECORD_CHARS)
    with open_text(path, newline="") as file:
        header = file.readline(MAX_RECORD_CHARS)
        if not header.strip():
            raise SourceError(f"{name} is empty", hint="the first line of a CSV file names its columns")
        separator = "\t" if ".tsv" in path.name.lower() else max(",;\t|", key=header.count)
        file.seek(0)
        rows = csv.reader(file, delimiter=separator, strict=True)
        try:
            columns = [column.strip() for column in next(rows)]
        except csv.Error as error:
            raise SourceError(f"{name}: the header line cannot be parsed: {error}") from None
        if repeated := sorted({column for column in columns if columns.count(column) > 1}):
            raise SourceError(f"{name}: duplicate column names: {format_list(repeated)}")
        yield from _csv_records(rows, columns, name)


def _csv_records(rows: Iterator[list[str]], columns: list[str], name: str) -> Iterator[Record | UnreadableRecord]:
    while True:
        place = f"{name}:{rows.line_num + 1}"  # type: ignore[attr-defined]
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield UnreadableRecord(place, f"not CSV: {error}")
            continue
        if len(fields) == len(columns):
            yield Record(dict(zip(columns, fields, strict=True)), place)
        elif any(field.strip() for field in fields):
            yield UnreadableRecord(place, f"{len(fields)} fields, but the header names {len(columns)} columns")


def read_parquet(path: Path, name: str) -> Iterator[Record | UnreadableRecord]:
    """One record per row. Raises MissingExtraError without pyarrow, SourceError if the file is not Parquet."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(f"{name}: Parquet files need pyarrow", hint=pip_install("pyarrow")) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(value, f"{name} row {number}")
    except (pyarrow.ArrowException, ValueError) as error:
        raise SourceError(f"{name} is not a Parquet file: {str(error).splitlines()[0]}") from None
