"""Rows of plain text files.

A file is one text. Of a file longer than 64 Ki characters, texts of at most that length are made, cut at blank lines
(at line ends or anywhere where there are none): so a book gives several rows, some of which can be held out for
validation, and a file larger than memory is read as it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergeforge.data.readers.json import open_text
from mergeforge.data.readers.open import Bad, Row

LONGEST = 1 << 16


def read_text(path: Path, name: str) -> Iterator[Row | Bad]:
    """Texts of at most LONGEST characters; each place is the line that it begins on."""
    line, held = 1, ""
    with open_text(path) as file:
        while piece := file.read(LONGEST):
            held += piece
            while len(held) > LONGEST:
                end = _cut(held)
                yield Row({"text": held[:end].strip("\n")}, f"{name}:{line}")
                line += held.count("\n", 0, end)
                held = held[end:]
    if held.strip():
        yield Row({"text": held.strip("\n")}, f"{name}:{line}")


def _cut(text: str) -> int:
    """Where the first text ends: after its last blank line, line end or space."""
    for sign in ("\n\n", "\n", " "):
        at = text.rfind(sign, LONGEST // 2, LONGEST)
        if at > 0:
            return at + len(sign)
    return LONGEST
