"""Topic files of `mergeforge data build`: questions with their reasoning and answers.

    {"description": "What it is called.",
     "entries": [
       {"question": "Who are you?", "think": "They ask for my name.", "output": "I am ${NAME}.", "difficulty": 1},
       {"question": ["Two lines", "as a list"], "output": "...", "difficulty": "hard", "tags": ["extra"]}]}

A list of entries alone will do too. `question` and `output` are needed. Text may be a list of lines, may hold line
breaks as they are typed, and is normalised: line ends, white space at the end of lines, empty lines around it, and
indentation that all lines share. `${NAME}` is filled in from the structure's placeholders (`$${NAME}` stays
`${NAME}`). Difficulty is 1 to 6, as a number, as "3" or "3/6", or as a word: trivial or very easy (1), easy (2),
medium or moderate (3), hard or difficult (4), very hard (5), expert (6). Everything else is an error.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.data.topics.structure import Topic
from mergeforge.errors import did_you_mean

KEYS = ("question", "think", "output", "difficulty", "tags")
FILE_KEYS = ("description", "entries")
HARDEST = 6
DIFFICULTIES = {
    **dict.fromkeys(("trivial", "very easy"), 1),
    "easy": 2,
    **dict.fromkeys(("medium", "moderate"), 3),
    **dict.fromkeys(("hard", "difficult"), 4),
    "very hard": 5,
    "expert": 6,
}
_FILLED = re.compile(r"\$(\$?)\{([^{}]*)\}")

Report = Callable[[str, str], None]  # what is wrong and where; a hint


@dataclass(frozen=True)
class Entry:
    """A question with its answer, as it will be trained on. `number`: its place in the file, from 1."""

    number: int
    question: str
    think: str
    output: str
    difficulty: int | None
    tags: tuple[str, ...]


def read_topic(topic: Topic, placeholders: Mapping[str, str], report: Report) -> list[Entry]:
    """The entries of a topic file; what is wrong in it is reported, with the number of the entry."""
    entries = _entries(topic.path, report)
    return [
        found
        for number, value in enumerate(entries, start=1)
        if (found := _Reader(f"{topic.path.name}, entry {number}", placeholders, report).entry(value, number))
    ]


def scaffold(topic: Topic) -> str:
    """A topic file without entries."""
    return json.dumps({"description": topic.description, "entries": []}, indent=2, ensure_ascii=False) + "\n"


def fill(written: str, placeholders: Mapping[str, str], where: str, report: Report) -> str:
    """Text with its placeholders filled in."""

    def value(match: re.Match[str]) -> str:
        escaped, name = match[1], match[2]
        if escaped:
            return match[0][1:]
        if name not in placeholders:
            known = f"known: {', '.join(placeholders) or 'none'}; ${match[0]} stays as it is"
            report(f"{where}: unknown placeholder {match[0]}", did_you_mean(name, placeholders) or known)
            return match[0]
        return placeholders[name]

    return _FILLED.sub(value, written)


def _entries(path: Path, report: Report) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), strict=False)  # lets line breaks stand in text
    except (OSError, ValueError, RecursionError) as error:
        report(f"{path.name} cannot be read: {error}", "")
        return []
    if isinstance(value, Mapping):
        for key in value:
            if key not in FILE_KEYS:
                report(
                    f"{path.name}: unknown key '{key}'", did_you_mean(key, FILE_KEYS) or "known: description, entries"
                )
        value = value.get("entries")
    if not isinstance(value, list):
        report(f"{path.name} has no list of entries", '{"entries": [...]}, or the list alone')
        return []
    return value


class _Reader:
    """Reads one entry and reports its mistakes."""

    def __init__(self, where: str, placeholders: Mapping[str, str], report: Report) -> None:
        self.where, self.placeholders, self._report = where, placeholders, report
        self.good = True

    def report(self, message: str, hint: str = "") -> None:
        self.good = False
        self._report(message, hint)

    def entry(self, value: Any, number: int) -> Entry | None:
        if not isinstance(value, Mapping):
            self.report(f"{self.where} is no object")
            return None
        for key in value:
            if key not in KEYS:
                self.report(
                    f"{self.where}: unknown key '{key}'", did_you_mean(key, KEYS) or f"known: {', '.join(KEYS)}"
                )
        found = Entry(
            number,
            self._text(value, "question", needed=True),
            self._text(value, "think"),
            self._text(value, "output", needed=True),
            self._difficulty(value.get("difficulty")),
            self._tags(value.get("tags")),
        )
        return found if self.good else None

    def _text(self, value: Mapping[str, Any], key: str, needed: bool = False) -> str:
        written = value.get(key)
        if isinstance(written, list) and all(isinstance(line, str) for line in written):
            written = "\n".join(written)
        if written is not None and not isinstance(written, str):
            self.report(f"{self.where}: {key} must be text or a list of lines")
            return ""
        text = normalised(written or "")
        if needed and not text:
            self.report(f"{self.where}: {key} is {'empty' if key in value else 'missing'}")
        return fill(text, self.placeholders, f"{self.where}, {key}", self.report)

    def _difficulty(self, value: Any) -> int | None:
        if value is None:
            return None
        found = difficulty(value)
        if found is None:
            self.report(f"{self.where}: difficulty {value!r} is none", f"1 to {HARDEST}, or {', '.join(DIFFICULTIES)}")
        return found

    def _tags(self, value: Any) -> tuple[str, ...]:
        tags = [value] if isinstance(value, str) else value or []
        if not isinstance(tags, list) or any(not isinstance(tag, str) or not tag for tag in tags):
            self.report(f"{self.where}: tags must be a list of words")
            return ()
        return tuple(tags)


def difficulty(value: Any) -> int | None:
    """1 to 6, or None for what is no difficulty."""
    if isinstance(value, str):
        word = " ".join(value.lower().replace("_", " ").replace("-", " ").split())
        if word in DIFFICULTIES:
            return DIFFICULTIES[word]
        match = re.fullmatch(rf"(\d+)(?:\s*/\s*{HARDEST})?", word)
        value = int(match[1]) if match else None
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    return int(value) if whole and 1 <= value <= HARDEST else None


def normalised(text: str) -> str:
    """Text with one kind of line end, nothing at the end of lines, no empty lines around it, no common indentation."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return textwrap.dedent("\n".join(lines)).strip("\n").rstrip()
