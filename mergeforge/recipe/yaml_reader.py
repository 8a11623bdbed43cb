"""Strict YAML: plain values, and the position of each.

Positions come from PyYAML's node tree. Refused, each with line and column: tags, duplicate keys,
keys that are not strings, more than 32 levels, more than 100,000 values counted
through aliases (an alias bomb is small until it is expanded), aliases that contain themselves,
files above 1 MiB.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mergeforge.errors import Problem, RecipeError

Path = tuple["str | int", ...]
Positions = dict[Path, tuple[int, int]]
ParsedDocument = tuple[
    Any, Positions, "list[Problem]"
]  # a value, the 1-based (line, column) of every key and item, mistakes

MAX_FILE_NBYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN = {f"tag:yaml.org,2002:{tag}" for tag in ("str", "int", "float", "bool", "null")}
_AS_STRING = {f"tag:yaml.org,2002:{tag}" for tag in ("timestamp", "value", "merge")}  # read as plain strings


def parse(text: str, name: str) -> list[ParsedDocument]:
    """Parse every document of a text.

    Raises RecipeError at once for invalid YAML or text beyond a limit.
    """
    try:
        _check_depth(text, name)
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise _syntax_error(error, name) from None
    except (ValueError, OverflowError) as error:  # PyYAML does not check the numbers of escapes and directives
        raise RecipeError(f"{name} is not valid YAML: {error}") from None
    if not documents:
        raise RecipeError(f"{name} is empty", hint="`mergeforge init` writes a recipe to start from")
    return [_parsed(document, name) for document in documents if len(documents) == 1 or not _is_empty(document)]


def _parsed(document: yaml.Node, name: str) -> ParsedDocument:
    reader = _NodeReader(name)
    return reader.value(document, ()), reader.positions, reader.problems


def _is_empty(document: yaml.Node) -> bool:
    """Whether a document is empty: `---` at the end of a file."""
    return isinstance(document, yaml.ScalarNode) and document.value == ""


def scalar(text: str) -> Any:
    """Parse the value of a `--set` option as YAML."""
    if not text.strip():
        return ""
    (value, _, problems), *rest = parse(text, "the value")
    if rest:
        raise RecipeError(f"{text!r} is more than one value")
    if problems:
        raise RecipeError(f"{text!r}: {problems[0]}")
    return value


def _check_depth(text: str, name: str) -> None:
    """Refuse deep nesting in the flat list of events, because composing is recursive."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _refusal(name, event, f"nested more than {MAX_DEPTH} levels deep")


def _refusal(name: str, at: yaml.Node | yaml.Event, message: str) -> RecipeError:
    return RecipeError(f"{name} cannot be read", problems=[Problem(*_position(at), message)])


def _syntax_error(error: yaml.YAMLError, name: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error)
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    return RecipeError(f"{name} cannot be read", problems=[Problem(line, column, f"invalid YAML: {text}")])


def _position(at: yaml.Node | yaml.Event) -> tuple[int, int]:
    mark = at.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)


class _NodeReader:
    """Turns one document's nodes into values; collects positions and mistakes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.positions: Positions = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()
        self._count = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._enter(node)
        self.positions.setdefault(path, _position(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.add(id(node))
        standard = "tag:yaml.org,2002:seq" if isinstance(node, yaml.SequenceNode) else "tag:yaml.org,2002:map"
        if node.tag != standard:
            self._refuse(node, f"the tag {node.tag} is not allowed")
        value: Any
        if isinstance(node, yaml.SequenceNode):
            value = [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            value = self._mapping(node, path)
        else:
            raise TypeError(f"an unknown YAML node: {node!r}")
        self._open.discard(id(node))
        return value

    def _enter(self, node: yaml.Node) -> None:
        self._count += 1
        if self._count > MAX_VALUES:
            raise _refusal(self.name, node, f"more than {MAX_VALUES:,} values once aliases are expanded")
        if id(node) in self._open:
            raise _refusal(self.name, node, "an alias contains itself")
        if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
            raise _refusal(self.name, node, "a lone surrogate is not valid text")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _PLAIN:
            try:
                return self._scalars.construct_object(node)
            except (ValueError, KeyError, yaml.YAMLError):
                self._refuse(node, f"{node.value[:40]!r} is not a valid value for the tag {node.tag}")
        elif node.tag not in _AS_STRING:
            self._refuse(node, f"the tag {node.tag} is not allowed")
        return node.value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                value = self.value(value_node, path)
                for mapping in value if isinstance(value, list) else [value]:
                    if isinstance(mapping, dict):
                        merged = {**mapping, **merged}
                    else:
                        self._refuse(value_node, "'<<' takes a mapping or a list of mappings")
                continue
            key = self._key(key_node)
            if key in result:
                self._refuse(key_node, f"duplicate key '{key}'")
            self.positions[(*path, key)] = _position(key_node)
            result[key] = self.value(value_node, (*path, key))
        return {**merged, **result}

    def _key(self, node: yaml.Node) -> str:
        self._enter(node)
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN:
            self._refuse(node, "a key must be a plain string")
            return "?"
        return str(node.value)

    def _refuse(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(*_position(node), message))
