"""Topic files of `mergeforge data build`: questions with their reasoning and answers.

    {"description": "What it is called.",
     "entries": [
       {"question": "Who are you?", "think": "They ask for my name.", "output": "I am ${NAME}.", "difficulty": 1},
       {"question": ["Two lines", "as a list"], "output": "...", "difficulty": "hard", "tags": ["extra"]}]}

A bare list of entries works too. `question` and `output` are required. Text may be a list of lines and may contain line
breaks as typed. It is normalized: line ends, white space at the end of lines, empty lines around it, and indentation
that all lines share. `${NAME}` is replaced by the structure's placeholder (`$${NAME}` becomes `${NAME}`). Difficulty is
1 to 6, as a number, as "3" or "3/6", or as a word: trivial or very easy (1), easy (2), medium or moderate (3), hard or
difficult (4), very hard (5), expert (6). Everything else is an error.
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
MAX_DIFFICULTY = 6
DIFFICULTIES = {
    **dict.fromkeys(("trivial", "very easy"), 1),
    "easy": 2,
    **dict.fromkeys(("medium", "moderate"), 3),
    **dict.fromkeys(("hard", "difficult"), 4),
    "very hard": 5,
    "expert": 6,
}
_PLACEHOLDER = re.compile(r"\$(\$?)\{([^{}]*)\}")

Report = Callable[[str, str], None]  # what is wrong and where; a hint


@dataclass(frozen=True)
class Entry:
    """A question with its answer, as it will be trained on. `number`: its position in the file, from 1."""

    number: int
    question: str
    think: str
    output: str
    difficulty: int | None
    tags: tuple[str, ...]


def read_topic(topic: Topic, placeholders: Mapping[str, str], report: Report) -> list[Entry]:
    """The valid entries of a topic file; mistakes are reported with the number of the entry."""
    values = _read_entries(topic.path, report)
    return [
        entry
        for number, value in enumerate(values, start=1)
        if (entry := _EntryReader(f"{topic.path.name}, entry {number}", placeholders, report).entry(value, number))
    ]


def empty_topic_file(topic: Topic) -> str:
    """The text of a topic file without entries."""
    return json.dumps({"description": topic.description, "entries": []}, indent=2, ensure_ascii=False) + "\n"


def fill_placeholders(text: str, placeholders: Mapping[str, str], where: str, report: Report) -> str:
    """The text with its placeholders replaced; unknown ones are reported."""

    def value(match: re.Match[str]) -> str:
        escaped, name = match[1], match[2]
        if escaped:
            return match[0][1:]
        if name not in placeholders:
            known = f"known: {', '.join(placeholders) or 'none'}; write ${match[0]} for a literal {match[0]}"
            report(f"{where}: unknown placeholder {match[0]}", did_you_mean(name, placeholders) or known)
            return match[0]
        return placeholders[name]

    return _PLACEHOLDER.sub(value, text)


def _read_entries(path: Path, report: Report) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), strict=False)  # strict=False allows line breaks
    except (OSError, ValueError, RecursionError) as error:
        report(f"{path.name} cannot be read: {error}", "")
        return []
    if isinstance(value, Mapping):
        for key in value:
            if key not in FILE_KEYS:
                hint = did_you_mean(key, FILE_KEYS) or f"known: {', '.join(FILE_KEYS)}"
                report(f"{path.name}: unknown key '{key}'", hint)
        value = value.get("entries")
    if not isinstance(value, list):
        report(f"{path.name} has no list of entries", 'write {"entries": [...]}, or just the list')
        return []
    return value


class _EntryReader:
    """Reads one entry and reports its mistakes."""

    def __init__(self, where: str, placeholders: Mapping[str, str], report: Report) -> None:
        self.where, self.placeholders, self._report = where, placeholders, report
        self.valid = True

    def report(self, message: str, hint: str = "") -> None:
        self.valid = False
        self._report(message, hint)

    def entry(self, value: Any, number: int) -> Entry | None:
        if not isinstance(value, Mapping):
            self.report(f"{self.where} is not an object")
            return None
        for key in value:
            if key not in KEYS:
                hint = did_you_mean(key, KEYS) or f"known: {', '.join(KEYS)}"
                self.report(f"{self.where}: unknown key '{key}'", hint)
        entry = Entry(
            number,
            self._text(value, "question", required=True),
            self._text(value, "think"),
            self._text(value, "output", required=True),
            self._difficulty(value.get("difficulty")),
            self._tags(value.get("tags")),
        )
        return entry if self.valid else None

    def _text(self, value: Mapping[str, Any], key: str, required: bool = False) -> str:
        text = value.get(key)
        if isinstance(text, list) and all(isinstance(line, str) for line in text):
            text = "\n".join(text)
        if text is not None and not isinstance(text, str):
            self.report(f"{self.where}: {key} must be text or a list of lines")
            return ""
        text = normalize_text(text or "")
        if required and not text:
            self.report(f"{self.where}: {key} is {'empty' if key in value else 'missing'}")
        return fill_placeholders(text, self.placeholders, f"{self.where}, {key}", self.report)

    def _difficulty(self, value: Any) -> int | None:
        if value is None:
            return None
        level = parse_difficulty(value)
        if level is None:
            hint = f"1 to {MAX_DIFFICULTY}, or {', '.join(DIFFICULTIES)}"
            self.report(f"{self.where}: unknown difficulty {value!r}", hint)
        return level

    def _tags(self, value: Any) -> tuple[str, ...]:
        tags = [value] if isinstance(value, str) else value or []
        if not isinstance(tags, list) or any(not isinstance(tag, str) or not tag for tag in tags):
            self.report(f"{self.where}: tags must be a list of words")
            return ()
        return tuple(tags)


def parse_difficulty(value: Any) -> int | None:
    """1 to 6, or None if the value is not a difficulty."""
    if isinstance(value, str):
        word = " ".join(value.lower().replace("_", " ").replace("-", " ").split())
        if word in DIFFICULTIES:
            return DIFFICULTIES[word]
        match = re.fullmatch(rf"(\d+)(?:\s*/\s*{MAX_DIFFICULTY})?", word)
        value = int(match[1]) if match else None
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    return int(value) if is_whole and 1 <= value <= MAX_DIFFICULTY else None


def normalize_text(text: str) -> str:
    """Text with \\n line ends, no white space at the end of lines, no empty lines around it, no common indentation."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return textwrap.dedent("\n".join(lines)).strip("\n").rstrip()
