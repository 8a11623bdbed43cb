"""Rows of JSON Lines and JSON files, streamed.

A .json file may hold a list of rows, an object with one list of rows, one row, or JSON Lines under a wrong name.
Bytes that are not UTF-8 are kept as lone surrogates here, so that only the rows that hold them are bad.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mergeforge.data.readers.open import LONGEST_ROW, Bad, Row, row_of
from mergeforge.errors import SourceError, listing

_CHUNK = 1 << 16
_DECODER = json.JSONDecoder()


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A file as text: UTF-8 with or without a mark, .gz too. Raises SourceError for UTF-16."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    raw = opener(path, "rb")
    start = raw.peek(2)[:2]
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raw.close()
        raise SourceError(f"{path} is UTF-16", hint="save it as UTF-8")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_jsonl(path: Path, name: str) -> Iterator[Row | Bad]:
    """A row a line; empty lines are none."""
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(_lines(file, name), start=1):
            if line.strip():
                yield _line(line, f"{name}:{number}")


def _lines(file: TextIO, name: str) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and not line.endswith("\n"):
            raise SourceError(f"{name}:{number}: a line of more than {LONGEST_ROW:,} characters is no row")
        yield line


def _line(line: str, place: str) -> Row | Bad:
    try:
        return row_of(json.loads(line.rstrip()), place)
    except json.JSONDecodeError as error:
        return Bad(place, f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deep; a number of more than 4300 digits
        return Bad(place, f"not JSON: {str(error).splitlines()[0]}")


def read_json(path: Path, name: str) -> Iterator[Row | Bad]:
    """The rows of a JSON file, whichever way it holds them. Raises SourceError where it is not JSON."""
    if _is_jsonl(path):
        yield from read_jsonl(path, name)
        return
    with open_text(path) as file:
        text = _Stream(file, name)
        first = text.peek()
        if first == "[":
            yield from _list(text, name)
        elif first == "{":
            yield from _object(text, name)
        else:
            raise SourceError(f"{name} is {'empty' if not first else 'no JSON list or object'}")
        if text.peek():
            raise text.error("more text after the end")


def _is_jsonl(path: Path) -> bool:
    """Whether the first line is a whole object and another line follows."""
    with open_text(path) as file:
        line = next((line for line in iter(lambda: file.readline(LONGEST_ROW), "") if line.strip()), "")
        try:
            whole = line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            return False
        return whole and any(line.strip() for line in iter(lambda: file.readline(_CHUNK), ""))


def _list(text: _Stream, name: str) -> Iterator[Row | Bad]:
    """The items of the list that stands next."""
    text.take("[")
    while text.peek() != "]":
        line = text.line
        yield row_of(text.value(), f"{name}:{line}")
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def _object(text: _Stream, name: str) -> Iterator[Row | Bad]:
    """The one list of rows in an object; or, where a list is one of messages, the object as a row."""
    others: dict[str, Any] = {}
    found: list[str] = []
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if text.peek() == "[" and text.peek(1) == "{" and not text.is_message():
            found.append(str(key))
            if len(found) > 1:
                hint = "keep one of them in a file of its own"
                raise SourceError(f"{name} holds more than one list: {listing(found)}", hint=hint)
            yield from _list(text, name)
        else:
            others[str(key)] = text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if not found:
        if any(isinstance(value, dict) for value in others.values()) or _is_columnar(others):
            hint = "pandas: to_json(..., orient='records', lines=True)"
            raise SourceError(f"{name} holds columns, not rows ({listing(others)})", hint=hint)
        yield row_of(others, f"{name}:1")


def _is_columnar(value: dict[str, Any]) -> bool:
    lists = [one for one in value.values() if isinstance(one, list) and not (one and isinstance(one[0], dict))]
    return len(lists) > 1


class _Stream:
    """JSON values one after the other from a file, of which little is held."""

    def __init__(self, file: TextIO, name: str) -> None:
        self.file, self.name = file, name
        self.buffer, self.at, self.line = "", 0, 1
        self.ended = False

    def peek(self, further: int = 0) -> str:
        """The next character that is not white space ("" at the end), or the one after it."""
        self._skip()
        at = self.at
        for _ in range(further):
            at += 1
            while at >= len(self.buffer) or self.buffer[at].isspace():
                if at >= len(self.buffer):
                    if not self._more():
                        return ""
                else:
                    at += 1
        return self.buffer[at] if at < len(self.buffer) else ""

    def take(self, sign: str) -> None:
        if self.peek() != sign:
            raise self.error(f"expected '{sign}'")
        self.at += 1

    def value(self) -> Any:
        """The next value, whole."""
        self._skip()
        value, end = self._decode(self.at)
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end
        return value

    def is_message(self) -> bool:
        """Whether the list that stands next begins with a message, not with a row."""
        first, _ = self._decode(self.buffer.index("{", self.at))
        keys = {str(key).lower() for key in first} if isinstance(first, dict) else set()
        return bool(keys & {"role", "from"}) and bool(keys & {"content", "value"})

    def _decode(self, at: int) -> tuple[Any, int]:
        """The value at a place of the buffer, and where it ends; reads on as far as it goes."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, at)
                if end < len(self.buffer) or not self._more():
                    return value, end
            except RecursionError:
                raise self.error("nested too deep") from None
            except json.JSONDecodeError as error:
                if len(self.buffer) - at > LONGEST_ROW or not self._more():
                    self.line += self.buffer.count("\n", self.at, error.pos)
                    raise self.error(error.msg) from None
            except ValueError as error:  # a number of more than 4300 digits
                raise self.error(str(error).splitlines()[0]) from None

    def error(self, why: str) -> SourceError:
        return SourceError(
            f"{self.name}:{self.line}: not JSON: {why}", hint="a row a line (.jsonl) loses only that row"
        )

    def _skip(self) -> None:
        if self.at > _CHUNK:
            self.buffer, self.at = self.buffer[self.at :], 0
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at].isspace():
                self.line += self.buffer[self.at] == "\n"
                self.at += 1
            if self.at < len(self.buffer) or not self._more():
                return

    def _more(self) -> bool:
        """Read on: as much again as is held, so that a long value costs its length twice and not its square."""
        piece = "" if self.ended else self.file.read(max(_CHUNK, len(self.buffer) - self.at))
        self.ended = not piece
        self.buffer += piece
        return bool(piece)
