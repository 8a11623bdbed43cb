"""Records of plain text files.

A file is one text. A file longer than 64 Ki characters becomes several texts of at most that length, cut at blank lines
(at line ends, or anywhere, if there are none). So a book gives several rows, some of which can be held out for
validation, and a file larger than memory is read as needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergeforge.data.readers.base import Record, UnreadableRecord, open_text

MAX_TEXT_CHARS = 1 << 16


def read_text(path: Path, name: str) -> Iterator[Record | UnreadableRecord]:
    """Texts of at most MAX_TEXT_CHARS characters; the place of each is the line it starts on."""
    line, pending = 1, ""
    with open_text(path) as file:
        while chunk := file.read(MAX_TEXT_CHARS):
            pending += chunk
            while len(pending) > MAX_TEXT_CHARS:
                end = _end_of_text(pending)
                yield Record({"text": pending[:end].strip("\n")}, f"{name}:{line}")
                line += pending.count("\n", 0, end)
                pending = pending[end:]
    if pending.strip():
        yield Record({"text": pending.strip("\n")}, f"{name}:{line}")


def _end_of_text(text: str) -> int:
    """Where the first text ends: after its last blank line, line end or space."""
    for separator in ("\n\n", "\n", " "):
        at = text.rfind(separator, MAX_TEXT_CHARS // 2, MAX_TEXT_CHARS)
        if at > 0:
            return at + len(separator)
    return MAX_TEXT_CHARS
