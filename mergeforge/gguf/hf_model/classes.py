"""What classes.json says about a Hugging Face class; tools/gguf_classes writes the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorPattern:
    """A stored tensor of every layer and expert: its name with {block} or {extra}, and {part}; the form of its shape;
    and the GGUF tensors that it becomes."""

    name: str
    form: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class HFClass:
    """A Hugging Face class.

    config: config.json with the class's defaults. keys: GGUF key -> the paths of the values that it is equal to.
    flags: path of a boolean -> its value in models that have tensors of this pattern. variants: ways to store the
    tensors, such as experts one by one and stacked. optional: tensors that only some models have, such as biases.
    """

    name: str
    arch: str
    config: Mapping[str, Any]
    keys: Mapping[str, tuple[str, ...]]
    flags: Mapping[str, tuple[bool, str]]
    variants: tuple[tuple[TensorPattern, ...], ...]
    optional: tuple[TensorPattern, ...]

    def states(self, name: str) -> bool:
        """Whether a key is equal to the config value of this name."""
        return any(path.rpartition(".")[2] == name for paths in self.keys.values() for path in paths)


@cache
def classes_of(arch: str) -> tuple[HFClass, ...]:
    """The classes whose GGUF architecture this is, the most common first; () for an unknown one."""
    return tuple(found for found in _classes() if found.arch == arch)


@cache
def known_architectures() -> tuple[str, ...]:
    return tuple(dict.fromkeys(found.arch for found in _classes()))


@cache
def _classes() -> tuple[HFClass, ...]:
    table = json.loads(Path(__file__).with_name("classes.json").read_text(encoding="utf-8"))
    return tuple(_class(name, entry) for name, entry in table.items())


def _class(name: str, entry: Mapping[str, Any]) -> HFClass:
    return HFClass(
        name,
        entry["arch"],
        entry["config"],
        {key: tuple(paths) for key, paths in entry["keys"].items()},
        {path: (on, pattern) for path, (on, pattern) in entry["flags"].items()},
        tuple(map(_patterns, entry["variants"])),
        _patterns(entry["optional"]),
    )


def _patterns(entries: Mapping[str, Any]) -> tuple[TensorPattern, ...]:
    return tuple(TensorPattern(name, form, tuple(targets)) for name, (form, *targets) in entries.items())
