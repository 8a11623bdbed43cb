"""From a checkpoint's tensor names to those of the model that transformers 5 makes of it.

transformers 5 renames, fuses and splits tensors as it loads them; an adapter speaks of the result.
hf_renames.json is its table (written by tools/tf5_names), by architecture class or model_type. The rules for
applying it are transformers/core_model_loading.py's (WeightTransform.rename_source_key): all renamings
in turn, then at most one converter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

_PARTS = {
    "text_config": ("model.language_model.", "language_model.", ""),
    "vision_config": ("model.vision_tower.", "vision_tower.", "model.vision_model."),
}
_VISION_CLASSES = {
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "clip_vision_model": "CLIPVisionModel",
}
_EXPERTS = (["MergeModulelist0"], ["MergeModulelist0", "Concatenate1"])


@dataclass(frozen=True)
class Part:
    """Where rows of a loaded tensor lie: a stored tensor, and of which expert they are (None: no stack).

    Rows [first, first + rows) of the loaded tensor (or of its expert) are rows [start, start + rows) of `name`.
    """

    name: str
    rows: int
    first: int = 0
    start: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class _Transform:
    """One row of the table. `scopes`: what a name must begin with; the rest is what the patterns speak of."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[str, ...]
    scopes: tuple[str, ...] = ("",)

    def match(self, name: str) -> tuple[str, int] | None:
        """The new name (with the first target) and which source matched."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        found = _compiled(self.sources).search(name.removeprefix(scope)) if scope is not None else None
        if scope is None or found is None:
            return None
        group = next(key for key, value in found.groupdict().items() if value is not None)
        new = self.targets[0]
        if r"\1" in new:
            new = new.replace(r"\1", found.group(_compiled(self.sources).groupindex[group] + 1))
        return scope + name.removeprefix(scope).replace(found.group(0), new, 1), int(group[1:])


@cache
def _compiled(sources: tuple[str, ...]) -> re.Pattern[str]:
    branches = []
    for at, source in sorted(enumerate(sources), key=lambda one: -len(one[1])):
        pattern = source.replace("*.", r".*\.")
        pattern += r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
        branches.append(f"(?P<g{at}>{pattern})")
    return re.compile("|".join(branches))


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("hf_renames.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def transforms_of(config: Mapping[str, Any]) -> list[_Transform]:
    """What transformers 5 does to the tensors of a model with this config: by its own rules, and those of its parts.

    A class comes before its model_type; the parts (the model under a head, text, vision) see their names
    without the prefix that the whole gives them (get_model_conversion_mapping).
    """
    known = _table()["of"]
    named = str((config.get("architectures") or [""])[0])
    own = next((name for name in (named, config.get("model_type")) if name in known), None)
    found: list[tuple[str, tuple[str, ...]]] = [(str(own), ("",))] if own else []
    inner = re.sub(r"For[A-Z]\w*$", "Model", named)
    if inner != named and inner in known:
        found.append((inner, ("model.", "")))
    for key, scopes in _PARTS.items():
        part = config.get(key)
        kind = str(part.get("model_type")) if isinstance(part, Mapping) else ""
        names = (kind, _VISION_CLASSES.get(kind, kind))
        found += [(name, scopes) for name in names[:2] if name in known][:1]
    return [
        _Transform(tuple(sources), tuple(targets), tuple(operations), scopes)
        for name, scopes in dict.fromkeys(found)
        for sources, targets, operations in _table()["sets"][known[name]]
    ]


def loaded_name(config: Mapping[str, Any], name: str) -> tuple[str, int | None, int] | None:
    """What one stored name becomes, its expert (None: no stack) and its place among what is concatenated; or None."""
    transforms = transforms_of(config)
    new = _renamed(transforms, name)
    converter = _converter(transforms, new)
    if converter is None:
        return (new, None, 0) if new != name else None
    transform, target, source = converter
    numbers = re.findall(r"experts\.(\d+)\.", new)
    return (target, int(numbers[-1]) if numbers else None, source) if list(transform.operations) in _EXPERTS else None


def loaded_tensors(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, tuple[Part, ...]]:
    """Tensors of the loaded model that the checkpoint calls or holds otherwise: loaded name -> its parts.

    `shapes`: the checkpoint's tensors. Conversions that are no renaming, stacking, splitting or joining of
    rows (rope permutations, transpositions) are left out: nothing can be said of where their rows lie.
    """
    transforms = transforms_of(config)
    found: dict[str, list[Part]] = {}
    groups: dict[tuple[str, _Transform], list[tuple[int, str]]] = {}
    for name in shapes if transforms else ():
        new = _renamed(transforms, name)
        converter = _converter(transforms, new)
        if converter is None:
            if new != name:
                found[new] = [Part(name, shapes[name][0] if shapes[name] else 1)]
        else:
            transform, target, source = converter
            groups.setdefault((target, transform), []).append((source, name))
    for (target, transform), members in groups.items():
        found |= _converted(target, transform, members, shapes)
    return {name: tuple(parts) for name, parts in found.items()}


def _renamed(transforms: Iterable[_Transform], name: str) -> str:
    for transform in transforms:
        if not transform.operations and (match := transform.match(name)):
            name = match[0]
    return name


def _converter(transforms: Iterable[_Transform], name: str) -> tuple[_Transform, str, int] | None:
    for transform in transforms:
        if transform.operations and (match := transform.match(name)):
            return transform, *match
    return None


def _converted(
    target: str, transform: _Transform, members: list[tuple[int, str]], shapes: Mapping[str, Shape]
) -> dict[str, list[Part]]:
    operations = list(transform.operations)
    members = sorted(
        members, key=lambda one: (one[0], [int(piece) if piece.isdecimal() else 0 for piece in one[1].split(".")])
    )
    if operations in _EXPERTS:
        return {target: _stacked(members, shapes)}
    if operations == ["Concatenate0"]:
        return {target: _joined(members, shapes)}
    if operations == ["Chunk0"] and len(members) == 1:
        name = members[0][1]
        rows = shapes[name][0] // len(transform.targets)
        names = [target.replace(transform.targets[0], other, 1) for other in transform.targets]
        return {other: [Part(name, rows, start=at * rows)] for at, other in enumerate(names)}
    return {}


def _stacked(members: list[tuple[int, str]], shapes: Mapping[str, Shape]) -> list[Part]:
    """Experts one on the other; within an expert, one source's rows after the other's."""
    parts: list[Part] = []
    offset = 0
    for source in dict.fromkeys(source for source, _ in members):
        names = [name for at, name in members if at == source]
        rows = shapes[names[0]][0]
        parts += [Part(name, rows, first=offset, expert=expert) for expert, name in enumerate(names)]
        offset += rows
    return parts


def _joined(members: list[tuple[int, str]], shapes: Mapping[str, Shape]) -> list[Part]:
    parts: list[Part] = []
    for _, name in members:
        parts.append(Part(name, shapes[name][0], first=sum(part.rows for part in parts)))
    return parts
