"""The structure file of `mergeforge data build`: which topics there are, and how their entries become rows.

    topics: topics                       # the folder of the topic files (default: topics, beside this file)
    placeholders: {NAME: Aria, MAKER: Example Ltd}
    system: You are ${NAME}, made by ${MAKER}.
    spelling: {think: "<think>{}</think>", output: "<output>{}</output>"}
    categories:
      identity:
        description: Who the assistant is.
        tags: [self]
        content_types: [qa]              # of every subcategory that names none itself
        subcategories:
          name:
            description: What it is called.
            tags: [name]
          origin:
            description: Who made it.
            content_types: [qa, reasoning]

There is one topic file for each type of each subcategory: `identity.name.qa.json`, `identity.origin.qa.json`, ...;
topic_file.py says what is in them. `spelling`: how an answer is put together, {} stands for the text;
`think` is only written for entries that have it (default: `<think>`, the text and `</think>` on lines of their own, an
empty line, then the output as it is). YAML or JSON; unknown keys are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.errors import Problem, RecipeError
from mergeforge.recipe import yaml_reader
from mergeforge.recipe.schema import ListOf, MapOf, Object, String

THINK, OUTPUT = "<think>\n{}\n</think>\n\n", "{}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PLACEHOLDER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS = ListOf(String(), allow_scalar=True)
_SUBCATEGORY = Object({"description": String(), "tags": _WORDS, "content_types": _WORDS})
_CATEGORY = Object(
    {
        "description": String("what the category is about"),
        "tags": _WORDS,
        "content_types": _WORDS,
        "subcategories": MapOf(_SUBCATEGORY),
    },
    required=("subcategories",),
)
STRUCTURE = Object(
    {
        "topics": String("the folder of the topic files"),
        "placeholders": MapOf(String(), "what ${NAME} stands for"),
        "system": String("the system message of every row"),
        "spelling": Object({"think": String(), "output": String()}),
        "categories": MapOf(_CATEGORY),
    },
    required=("categories",),
)


@dataclass(frozen=True)
class Topic:
    """One topic file: where it lies, and what its rows are told besides what stands in it."""

    path: Path
    category: str
    subcategory: str
    kind: str
    description: str
    tags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.category}.{self.subcategory}.{self.kind}"


@dataclass(frozen=True)
class Structure:
    """A structure file, read."""

    path: Path
    folder: Path
    topics: tuple[Topic, ...]
    placeholders: Mapping[str, str]
    system: str
    think: str
    output: str


def read_structure(path: Path) -> Structure:
    """Read a structure file. Raises RecipeError with every mistake in it."""
    value, places, problems = _parsed(path)

    def report(path: yaml_reader.Path, message: str, hint: str = "") -> None:
        place = path
        while place and place not in places:
            place = place[:-1]
        problems.append(Problem(*places.get(place, (0, 0)), message, hint))

    read = STRUCTURE.read(value, (), report)
    folder = path.parent / (read.get("topics") or "topics")
    topics = list(_topics(read, folder, report)) if not problems else []
    _check(read, report)
    if problems:
        raise RecipeError(f"{path} has mistakes:", problems=sorted(set(problems)))
    spelling = read.get("spelling") or {}
    return Structure(
        path,
        folder,
        tuple(topics),
        read.get("placeholders") or {},
        read.get("system") or "",
        spelling.get("think") or THINK,
        spelling.get("output") or OUTPUT,
    )


def _parsed(path: Path) -> yaml_reader.ParsedDocument:
    try:
        written = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"there is no structure file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    if path.suffix.lower() != ".json":
        documents = yaml_reader.parse(written, str(path))
        if len(documents) > 1:
            raise RecipeError(f"{path} holds more than one document")
        return documents[0]
    try:
        return json.loads(written), {}, []
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON: {error}") from None


def _topics(read: Mapping[str, Any], folder: Path, report: Any) -> Iterator[Topic]:
    """Every topic file that the structure asks for, in its order."""
    for name, category in read["categories"].items():
        for sub, inner in category["subcategories"].items():
            here = ("categories", name, "subcategories", sub)
            kinds = inner.get("content_types") or category.get("content_types") or []
            if not kinds:
                report(here, f"'{sub}' has no content_types, nor has its category", "content_types: [qa]")
            tags = tuple(dict.fromkeys([*category.get("tags", ()), *inner.get("tags", ())]))
            about = inner.get("description") or category.get("description") or ""
            for kind in kinds:
                for part in (name, sub, kind):
                    if not _NAME.fullmatch(part):
                        report(here, f"'{part}' cannot be part of a file's name", "letters, digits, _ and -")
                yield Topic(folder / f"{name}.{sub}.{kind}.json", name, sub, kind, about, tags)


def _check(read: Mapping[str, Any], report: Any) -> None:
    """What only the whole file can tell."""
    for name in read.get("placeholders") or {}:
        if not _PLACEHOLDER.fullmatch(name):
            report(("placeholders", name), f"'{name}' cannot be a placeholder's name", "letters, digits and _")
    for part, spelled in (read.get("spelling") or {}).items():
        if isinstance(spelled, str) and spelled.count("{}") != 1:
            report(
                ("spelling", part),
                f"'{part}' must have {{}} once, where the text goes",
                f"such as <{part}>{{}}</{part}>",
            )
    if isinstance(read.get("categories"), Mapping) and not read["categories"]:
        report(("categories",), "there are no categories", "")
