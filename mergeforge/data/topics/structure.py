"""The structure file of `mergeforge data build`: which topics exist, and how their entries become rows.

    topics: topics                       # the folder of the topic files (default: topics, beside this file, or the
                                         # folder `topics` that this file is in)
    layout: hierarchical                 # a folder for each category and subcategory, or flat (default: as it is)
    placeholders: {NAME: Aria, MAKER: Example Ltd}
    system: You are ${NAME}, made by ${MAKER}.
    spelling: {think: "<think>{}</think>", output: "<output>{}</output>"}
    categories:
      identity:
        description: Who the assistant is.
        tags: [self]
        content_types: [qa]              # default for subcategories that name none
        subcategories:
          name:
            description: What it is called.
            tags: [name]
          origin:
            description: Who made it.
            content_types: [qa, reasoning]

There is one topic file per type of each subcategory: `identity.name.qa.json`, `identity.origin.qa.json`, ..., either
all in the folder (flat) or in `identity/name/identity.name.qa.json` (hierarchical); topic_file.py describes them.
`spelling` says how an answer is assembled; {} stands for the text. `think` is written only for entries that have it
(default: `<think>`, the text and `</think>` on lines of their own, an empty line, then the unchanged output). YAML or
JSON; unknown keys are errors.
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
from mergeforge.recipe.schema import Enum, ListOf, MapOf, Object, String

FLAT, HIERARCHICAL = LAYOUTS = ("flat", "hierarchical")
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
        "layout": Enum(LAYOUTS, "where in the folder they are: flat, or in a folder per category and subcategory"),
        "placeholders": MapOf(String(), "what ${NAME} stands for"),
        "system": String("the system message of every row"),
        "spelling": Object({"think": String(), "output": String()}),
        "categories": MapOf(_CATEGORY),
    },
    required=("categories",),
)


@dataclass(frozen=True)
class Topic:
    """One topic file: its path, and the metadata that its rows get from the structure."""

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
    """A parsed structure file."""

    path: Path
    folder: Path
    topics: tuple[Topic, ...]
    placeholders: Mapping[str, str]
    system: str
    think: str
    output: str


def read_structure(path: Path) -> Structure:
    """Read a structure file. Raises RecipeError with every mistake in it."""
    value, positions, problems = _parse(path)

    def report(path: yaml_reader.Path, message: str, hint: str = "") -> None:
        known = path
        while known and known not in positions:
            known = known[:-1]
        problems.append(Problem(*positions.get(known, (0, 0)), message, hint))

    checked = STRUCTURE.read(value, (), report)
    folder = _topics_folder(path, checked.get("topics"))
    topics: list[Topic] = []
    if not problems:
        layout = checked.get("layout") or _layout_on_disk(checked, folder)
        topics = list(_topics(checked, folder, layout, report))
    _check(checked, report)
    if problems:
        raise RecipeError(f"{path} has mistakes:", problems=sorted(set(problems)))
    spelling = checked.get("spelling") or {}
    return Structure(
        path,
        folder,
        tuple(topics),
        checked.get("placeholders") or {},
        checked.get("system") or "",
        spelling.get("think") or THINK,
        spelling.get("output") or OUTPUT,
    )


def _parse(path: Path) -> yaml_reader.ParsedDocument:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"there is no structure file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    if path.suffix.lower() != ".json":
        documents = yaml_reader.parse(text, str(path))
        if len(documents) > 1:
            raise RecipeError(f"{path} holds more than one YAML document")
        return documents[0]
    try:
        return json.loads(text), {}, []
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON: {error}") from None


def _topics_folder(path: Path, named: str | None) -> Path:
    folder = path.parent / (named or "topics")
    is_inside = named is None and not folder.exists() and path.absolute().parent.name == "topics"
    return path.parent if is_inside else folder


def _layout_on_disk(structure: Mapping[str, Any], folder: Path) -> str:
    """Hierarchical if there is a folder of a category."""
    return HIERARCHICAL if any((folder / str(name)).is_dir() for name in structure["categories"]) else FLAT


def _topics(structure: Mapping[str, Any], folder: Path, layout: str, report: Any) -> Iterator[Topic]:
    """Every topic file that the structure asks for, in its order."""
    for name, category in structure["categories"].items():
        for subname, subcategory in category["subcategories"].items():
            path = ("categories", name, "subcategories", subname)
            kinds = subcategory.get("content_types") or category.get("content_types") or []
            if not kinds:
                report(path, f"neither '{subname}' nor its category has content_types", "content_types: [qa]")
            tags = tuple(dict.fromkeys([*category.get("tags", ()), *subcategory.get("tags", ())]))
            description = subcategory.get("description") or category.get("description") or ""
            for kind in kinds:
                for part in (name, subname, kind):
                    if not _NAME.fullmatch(part):
                        report(path, f"'{part}' cannot be part of a file name", "use letters, digits, _ and -")
                inside = folder / name / subname if layout == HIERARCHICAL else folder
                yield Topic(inside / f"{name}.{subname}.{kind}.json", name, subname, kind, description, tags)


def _check(structure: Mapping[str, Any], report: Any) -> None:
    """Report what the schema cannot check."""
    for name in structure.get("placeholders") or {}:
        if not _PLACEHOLDER.fullmatch(name):
            report(("placeholders", name), f"'{name}' is not a valid placeholder name", "use letters, digits and _")
    for part, pattern in (structure.get("spelling") or {}).items():
        if isinstance(pattern, str) and pattern.count("{}") != 1:
            message = f"'{part}' must contain {{}} exactly once, where the text goes"
            report(("spelling", part), message, f"such as <{part}>{{}}</{part}>")
    if isinstance(structure.get("categories"), Mapping) and not structure["categories"]:
        report(("categories",), "there are no categories", "")
