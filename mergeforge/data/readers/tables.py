"""Rows of CSV, TSV and parquet files, streamed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from mergeforge.data.readers.json import open_text
from mergeforge.data.readers.open import LONGEST_ROW, Bad, Row
from mergeforge.errors import MissingExtraError, SourceError, listing

_BATCH = 256  # rows of parquet held at a time


def read_csv(path: Path, name: str) -> Iterator[Row | Bad]:
    """A row a record; the first line names the columns. Comma, semicolon, tab or bar, as that line has it."""
    csv.field_size_limit(LONGEST_ROW)
    with open_text(path, newline="") as file:
        first = file.readline(LONGEST_ROW)
        if not first.strip():
            raise SourceError(f"{name} is empty", hint="the first line of a CSV file names its columns")
        mark = "\t" if ".tsv" in path.name.lower() else max(",;\t|", key=first.count)
        file.seek(0)
        records = csv.reader(file, delimiter=mark, strict=True)
        try:
            columns = [column.strip() for column in next(records)]
        except csv.Error as error:
            raise SourceError(f"{name}: its first line names no columns: {error}") from None
        if repeated := sorted({column for column in columns if columns.count(column) > 1}):
            raise SourceError(f"{name} has columns of one name: {listing(repeated)}")
        yield from _records(records, columns, name)


def _records(records: Iterator[list[str]], columns: list[str], name: str) -> Iterator[Row | Bad]:
    while True:
        place = f"{name}:{records.line_num + 1}"  # type: ignore[attr-defined]
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            yield Bad(place, f"not CSV: {error}")
            continue
        if len(fields) == len(columns):
            yield Row(dict(zip(columns, fields, strict=True)), place)
        elif any(field.strip() for field in fields):
            yield Bad(place, f"{len(fields)} fields where the first line names {len(columns)} columns")


def read_parquet(path: Path, name: str) -> Iterator[Row | Bad]:
    """A row a record. Raises MissingExtraError without pyarrow, SourceError for what is not parquet."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            f"{name}: reading parquet needs pyarrow", hint="pip install 'mergeforge[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{name} row {number}")
    except (pyarrow.ArrowException, ValueError) as error:
        raise SourceError(f"{name} is not parquet: {str(error).splitlines()[0]}") from None
