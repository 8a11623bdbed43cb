"""Records of JSON Lines and JSON files, streamed.

A .json file may hold a list of records, an object with one list of records, one record, or JSON Lines with the wrong
suffix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mergeforge.data.readers.base import MAX_RECORD_CHARS, Record, UnreadableRecord, as_record, is_message, open_text
from mergeforge.errors import SourceError, format_list

_CHUNK = 1 << 16  # characters read at once
_DECODER = json.JSONDecoder()


def read_jsonl(path: Path, name: str) -> Iterator[Record | UnreadableRecord]:
    """One record per line; empty lines are skipped. A file that holds one JSON list is read as such."""
    if _is_json_list(path):
        yield from read_json(path, name)
        return
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(_lines(file, name), start=1):
            if line.strip():
                yield _parse_line(line, f"{name}:{number}")


def _lines(file: TextIO, name: str) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_RECORD_CHARS):
        number += 1
        if len(line) == MAX_RECORD_CHARS and not line.endswith("\n"):
            raise SourceError(f"{name}:{number}: the line is longer than {MAX_RECORD_CHARS:,} characters")
        yield line


def _parse_line(line: str, place: str) -> Record | UnreadableRecord:
    try:
        return as_record(json.loads(line.rstrip()), place)
    except json.JSONDecodeError as error:
        return UnreadableRecord(place, f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deep; a number of more than 4300 digits
        return UnreadableRecord(place, f"not JSON: {str(error).splitlines()[0]}")


def read_json(path: Path, name: str) -> Iterator[Record | UnreadableRecord]:
    """The records of a JSON file, however it is laid out. Raises SourceError if it is not JSON."""
    if _is_jsonl(path):
        yield from read_jsonl(path, name)
        return
    with open_text(path) as file:
        stream = _JsonStream(file, name)
        first = stream.peek()
        if first == "[":
            yield from _read_list(stream, name)
        elif first == "{":
            yield from _read_object(stream, name)
        else:
            raise SourceError(f"{name} is {'empty' if not first else 'not a JSON list or object'}")
        if stream.peek():
            raise stream.error("more text after the end")


def _is_json_list(path: Path) -> bool:
    """Whether a file is one list of records rather than a value on each line."""
    with open_text(path) as file:
        lines = (line.strip() for line in iter(lambda: file.readline(MAX_RECORD_CHARS), ""))
        first = next((line for line in lines if line), "")
        if not first.startswith("["):
            return False
        if first == "[" or first.endswith(("},", "{")):
            return True
        try:
            value = json.loads(first)
        except (ValueError, RecursionError):
            return False
        is_record = bool(value) and isinstance(value[0], dict) and not is_message(value[0])
        return is_record and not any(lines)


def _is_jsonl(path: Path) -> bool:
    """Whether the first line is a whole object and another line follows."""
    with open_text(path) as file:
        line = next((line for line in iter(lambda: file.readline(MAX_RECORD_CHARS), "") if line.strip()), "")
        try:
            is_object = line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            return False
        return is_object and any(line.strip() for line in iter(lambda: file.readline(_CHUNK), ""))


def _read_list(stream: _JsonStream, name: str) -> Iterator[Record | UnreadableRecord]:
    """The items of the list that comes next."""
    stream.take("[")
    while stream.peek() != "]":
        line = stream.line
        yield as_record(stream.value(), f"{name}:{line}")
        if stream.peek() != "]":
            stream.take(",")
    stream.take("]")


def _read_object(stream: _JsonStream, name: str) -> Iterator[Record | UnreadableRecord]:
    """The one list of records in an object; or the object as one record, if its list holds messages."""
    other_values: dict[str, Any] = {}
    lists: list[str] = []
    stream.take("{")
    while stream.peek() != "}":
        key = stream.value()
        stream.take(":")
        if stream.peek() == "[" and stream.peek(1) == "{" and not stream.at_message_list():
            lists.append(str(key))
            if len(lists) > 1:
                hint = "put each list into a file of its own"
                raise SourceError(f"{name} holds more than one list: {format_list(lists)}", hint=hint)
            yield from _read_list(stream, name)
        else:
            other_values[str(key)] = stream.value()
        if stream.peek() != "}":
            stream.take(",")
    stream.take("}")
    if not lists:
        if any(isinstance(value, dict) for value in other_values.values()) or _is_columnar(other_values):
            hint = "with pandas: to_json(..., orient='records', lines=True)"
            raise SourceError(f"{name} holds columns, not rows ({format_list(other_values)})", hint=hint)
        yield as_record(other_values, f"{name}:1")


def _is_columnar(value: dict[str, Any]) -> bool:
    columns = [item for item in value.values() if isinstance(item, list) and not (item and isinstance(item[0], dict))]
    return len(columns) > 1


class _JsonStream:
    """JSON values one after the other from a file, with little of it in memory."""

    def __init__(self, file: TextIO, name: str) -> None:
        self.file, self.name = file, name
        self.buffer, self.at, self.line = "", 0, 1
        self.ended = False

    def peek(self, skip: int = 0) -> str:
        """The next character that is not white space ("" at the end), or the one `skip` such characters later."""
        self._skip_space()
        at = self.at
        for _ in range(skip):
            at += 1
            while at >= len(self.buffer) or self.buffer[at].isspace():
                if at >= len(self.buffer):
                    if not self._read_more():
                        return ""
                else:
                    at += 1
        return self.buffer[at] if at < len(self.buffer) else ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"expected '{character}'")
        self.at += 1

    def value(self) -> Any:
        """The whole next value."""
        self._skip_space()
        value, end = self._decode(self.at)
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end
        return value

    def at_message_list(self) -> bool:
        """Whether the next list starts with a message rather than a record."""
        first, _ = self._decode(self.buffer.index("{", self.at))
        return is_message(first)

    def _decode(self, at: int) -> tuple[Any, int]:
        """(value, end) of the value that starts at `at` in the buffer; reads on until it is complete."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, at)
                if end < len(self.buffer) or not self._read_more():
                    return value, end
            except RecursionError:
                raise self.error("nested too deep") from None
            except json.JSONDecodeError as error:
                if len(self.buffer) - at > MAX_RECORD_CHARS or not self._read_more():
                    self.line += self.buffer.count("\n", self.at, error.pos)
                    raise self.error(error.msg) from None
            except ValueError as error:  # a number of more than 4300 digits
                raise self.error(str(error).splitlines()[0]) from None

    def error(self, why: str) -> SourceError:
        hint = "in JSON Lines (.jsonl) a broken row costs only that row"
        return SourceError(f"{self.name}:{self.line}: not JSON: {why}", hint=hint)

    def _skip_space(self) -> None:
        if self.at > _CHUNK:
            self.buffer, self.at = self.buffer[self.at :], 0
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at].isspace():
                self.line += self.buffer[self.at] == "\n"
                self.at += 1
            if self.at < len(self.buffer) or not self._read_more():
                return

    def _read_more(self) -> bool:
        """Read as much again as is buffered, so that a long value costs twice its length, not its square."""
        chunk = "" if self.ended else self.file.read(max(_CHUNK, len(self.buffer) - self.at))
        self.ended = not chunk
        self.buffer += chunk
        return bool(chunk)
