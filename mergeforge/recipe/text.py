"""YAML text -> plain values and where each stands, strictly.

PyYAML's node tree is used for positions. Refused, each with line and column: tags, duplicate keys,
keys that are not text, a second document, more than 32 levels, more than 100,000 values counted
through aliases (an alias bomb is small until it is expanded), aliases that contain themselves,
files above 1 MiB.
"""

from __future__ import annotations

from typing import Any

import yaml

from mergeforge.errors import Problem, RecipeError

Path = tuple["str | int", ...]
Places = dict[Path, tuple[int, int]]

LARGEST_FILE = 1 << 20
DEEPEST = 32
MOST_VALUES = 100_000
_PLAIN = {f"tag:yaml.org,2002:{tag}" for tag in ("str", "int", "float", "bool", "null")}


def parse(text: str, name: str) -> tuple[Any, Places, list[Problem]]:
    """The text's value, the 1-based (line, column) of every key and item, and the mistakes found.

    Raises RecipeError at once for text that is not YAML or goes past a limit.
    """
    if len(text) > LARGEST_FILE:
        raise RecipeError(f"{name} is larger than 1 MiB", hint="a recipe is a few dozen lines")
    try:
        _check_depth(text, name)
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise _syntax_error(error, name) from None
    if not documents:
        raise RecipeError(f"{name} is empty", hint="`mergeforge init` writes a recipe to start from")
    if len(documents) > 1:
        raise _refusal(name, documents[1], "a second document starts here; one recipe is one document")
    reader = _Reader(name)
    return reader.value(documents[0], ()), reader.places, reader.problems


def scalar(text: str) -> Any:
    """The value of a `--set` text, read as YAML would read it."""
    value, _, problems = parse(text, "--set") if text.strip() else ("", {}, [])
    if problems:
        raise RecipeError(f"--set: {problems[0]}")
    return value


def _check_depth(text: str, name: str) -> None:
    """Refuse deep nesting while it is still a flat list of events: composing is recursive."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _refusal(name, event, f"nested more than {DEEPEST} levels deep")


def _refusal(name: str, at: yaml.Node | yaml.Event, message: str) -> RecipeError:
    return RecipeError(f"{name} cannot be read", problems=[Problem(*_place(at), message)])


def _syntax_error(error: yaml.YAMLError, name: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error)
    problem = Problem(mark.line + 1 if mark else 0, mark.column + 1 if mark else 0, f"not YAML: {text}")
    return RecipeError(f"{name} cannot be read", problems=[problem])


def _place(at: yaml.Node | yaml.Event) -> tuple[int, int]:
    return (at.start_mark.line + 1, at.start_mark.column + 1)


class _Reader:
    """Turns one document's nodes into values, noting places and mistakes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: Places = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()
        self._count = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._enter(node)
        self.places.setdefault(path, _place(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.add(id(node))
        standard = "tag:yaml.org,2002:seq" if isinstance(node, yaml.SequenceNode) else "tag:yaml.org,2002:map"
        if node.tag != standard:
            self._refuse(node, f"the tag {node.tag} is not allowed")
        value: Any
        if isinstance(node, yaml.SequenceNode):
            value = [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            value = self._mapping(node, path)
        self._open.discard(id(node))
        return value

    def _enter(self, node: yaml.Node) -> None:
        self._count += 1
        if self._count > MOST_VALUES:
            raise _refusal(self.name, node, f"more than {MOST_VALUES:,} values once aliases are expanded")
        if id(node) in self._open:
            raise _refusal(self.name, node, "an alias contains itself")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _PLAIN:
            return self._scalars.construct_object(node)
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            self._refuse(node, f"the tag {node.tag} is not allowed")
        return node.value  # a date or the like: the recipe has none, so it is its own text

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                value = self.value(value_node, path)
                for mapping in value if isinstance(value, list) else [value]:
                    if isinstance(mapping, dict):
                        merged = {**mapping, **merged}
                continue
            key = self._key(key_node)
            if key in result:
                self._refuse(key_node, f"'{key}' stands here a second time")
            self.places[(*path, key)] = _place(key_node)
            result[key] = self.value(value_node, (*path, key))
        return {**merged, **result}

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN:
            self._refuse(node, "a key must be plain text")
            return "?"
        return str(node.value)

    def _refuse(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(*_place(node), message))
