"""Builds one JSONL file of conversations with metadata from a hierarchy of topic files.

structure.py and topic_file.py describe the files. A row:

    {"messages": [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", ...}],
     "id": "identity.name.qa:1", "category": "identity", "subcategory": "name", "type": "qa",
     "tags": ["self", "name"], "difficulty": 1}
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.data.topics.structure import Structure, Topic, read_structure
from mergeforge.data.topics.topic_file import Entry, empty_topic_file, fill_placeholders, read_topic
from mergeforge.errors import OutputError, Problem, RecipeError, did_you_mean, format_list
from mergeforge.io.disk import disk_error


@dataclass(frozen=True)
class BuildResult:
    """What was written (nothing if there are no rows yet): rows in total, by category and by difficulty.

    `scaffolded`: topic files that were created; `empty`: topic files without entries.
    """

    out: Path
    rows: int
    topics: int
    categories: Mapping[str, int]
    difficulties: Mapping[str, int]
    scaffolded: tuple[str, ...]
    empty: tuple[str, ...]


def build(structure_file: str | Path, out: str | Path, *, scaffold: bool = False) -> BuildResult:
    """Write the rows of all topic files. scaffold: first create the missing topic files, without entries.

    Raises RecipeError with every mistake in the structure or the topic files, OutputError.
    """
    structure, out = read_structure(Path(structure_file)), Path(out)
    _check_out(structure, out)
    created = _create_missing(structure.topics, structure.folder) if scaffold else ()
    rows, empty = _rows(structure)
    if not rows and not created:
        raise RecipeError(f"the topic files in {structure.folder} hold no entries", hint="fill in their 'entries'")
    if rows:
        _write(out, rows)
    by_difficulty = Counter(str(row["difficulty"]) for row in rows if "difficulty" in row)
    return BuildResult(
        out,
        len(rows),
        len(structure.topics) - len(empty),
        dict(Counter(row["category"] for row in rows)),
        dict(sorted(by_difficulty.items())),
        created,
        empty,
    )


def _rows(structure: Structure) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """(rows, names of topic files without entries)."""
    problems: list[Problem] = []

    def report(message: str, hint: str) -> None:
        problems.append(Problem(0, 0, message, hint))

    _check_files(structure, report)
    system = fill_placeholders(structure.system, structure.placeholders, f"{structure.path.name}, system", report)
    rows: list[dict[str, Any]] = []
    empty: list[str] = []
    for topic in structure.topics if not problems else ():
        before = len(problems)
        entries = read_topic(topic, structure.placeholders, report)
        if not entries and len(problems) == before:
            empty.append(topic.path.name)
        rows += [_row(entry, topic, structure, system) for entry in entries]
    if problems:
        raise RecipeError(f"{structure.path}: the topic files have mistakes:", problems=problems)
    return rows, tuple(empty)


def _row(entry: Entry, topic: Topic, structure: Structure, system: str) -> dict[str, Any]:
    think = structure.think.replace("{}", entry.think, 1) if entry.think else ""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": entry.question},
        {"role": "assistant", "content": think + structure.output.replace("{}", entry.output, 1)},
    ]
    return {
        "messages": messages,
        "id": f"{topic.name}:{entry.number}",
        "category": topic.category,
        "subcategory": topic.subcategory,
        "type": topic.kind,
        "tags": list(dict.fromkeys([*topic.tags, *entry.tags])),
        **({} if entry.difficulty is None else {"difficulty": entry.difficulty}),
    }


def _check_files(structure: Structure, report: Any) -> None:
    """Report topic files that are missing, and files that the structure does not name."""
    expected = {topic.path.relative_to(structure.folder).as_posix() for topic in structure.topics}
    files = [path for path in structure.folder.rglob("*.json") if path.resolve() != structure.path.resolve()]
    present = {path.relative_to(structure.folder).as_posix() for path in files}
    if missing := sorted(expected - present):
        report(f"{structure.folder} lacks {format_list(missing)}", "`mergeforge data scaffold` creates them")
    by_name = {name.rpartition("/")[2]: name for name in expected}
    for name in sorted(present - expected):
        elsewhere = by_name.get(name.rpartition("/")[2])
        hint = f"it belongs at {structure.folder / elsewhere}" if elsewhere else did_you_mean(name, expected)
        report(f"{structure.folder / name} is not part of the structure", hint)


def scaffold_topics(structure_file: str | Path) -> tuple[Path, ...]:
    """Create the topic files that a structure names and that do not exist, without entries.

    Raises RecipeError with every mistake in the structure.
    """
    structure = read_structure(Path(structure_file))
    missing = [topic for topic in structure.topics if not topic.path.exists()]
    _create_missing(missing, structure.folder)
    return tuple(topic.path for topic in missing)


def _create_missing(topics: Sequence[Topic], folder: Path) -> tuple[str, ...]:
    """Create the topic files that do not exist, and return their names."""
    missing = [topic for topic in topics if not topic.path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for topic in missing:
            topic.path.parent.mkdir(parents=True, exist_ok=True)
            topic.path.write_text(empty_topic_file(topic), encoding="utf-8")
    except OSError as error:
        raise disk_error(error, str(folder)) from error
    return tuple(topic.path.name for topic in missing)


def _check_out(structure: Structure, out: Path) -> None:
    inputs = [structure.path, *(topic.path for topic in structure.topics)]
    if any(out.resolve() == path.resolve() for path in inputs):
        raise OutputError(f"{out} is an input", hint="choose another --out")


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    temporary = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, out)
    except OSError as error:
        raise disk_error(error, str(out)) from error
