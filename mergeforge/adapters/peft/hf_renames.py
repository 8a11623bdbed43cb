"""Map a checkpoint's tensor names to those of the model that transformers 5 loads from it.

transformers 5 renames, fuses and splits tensors as it loads them; the keys of an adapter refer to the result.
hf_renames.json is its conversion table (written by tools/tf5_names), by architecture class or model_type. The
rules for applying it are those of transformers/core_model_loading.py (WeightTransform.rename_source_key): all
renamings in turn, then at most one converter.
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

_SUBMODELS = {
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
class LoadedSlice:
    """Rows of a loaded tensor, and where the checkpoint stores them.

    Rows [loaded_start, loaded_start + rows) of the loaded tensor are rows [stored_start, stored_start + rows) of
    the stored tensor `name`. In a stack of experts these are rows of `expert`; None: not a stack.
    """

    name: str
    rows: int
    loaded_start: int = 0
    stored_start: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class _Transform:
    """One entry of the table. `scopes`: prefixes, one of which a name must have; the patterns match the rest."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[str, ...]
    scopes: tuple[str, ...] = ("",)

    def match(self, name: str) -> tuple[str, int] | None:
        """Return the new name (with the first target) and the index of the source that matched."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        hit = _compiled(self.sources).search(name.removeprefix(scope)) if scope is not None else None
        if scope is None or hit is None:
            return None
        group = next(key for key, value in hit.groupdict().items() if value is not None)
        target = self.targets[0]
        if r"\1" in target:
            target = target.replace(r"\1", hit.group(_compiled(self.sources).groupindex[group] + 1))
        return scope + name.removeprefix(scope).replace(hit.group(0), target, 1), int(group[1:])


@cache
def _compiled(sources: tuple[str, ...]) -> re.Pattern[str]:
    branches = []
    for at, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
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
    """The conversions that transformers 5 applies to a model with this config: its own, and those of its submodels.

    An entry for the class takes precedence over one for the model_type. The rules of submodels (the model under a
    head, text, vision) apply to names without the submodel's prefix (get_model_conversion_mapping).
    """
    known = _table()["of"]
    named = str((config.get("architectures") or [""])[0])
    own = next((name for name in (named, config.get("model_type")) if name in known), None)
    entries: list[tuple[str, tuple[str, ...]]] = [(str(own), ("",))] if own else []
    inner = re.sub(r"For[A-Z]\w*$", "Model", named)
    if inner != named and inner in known:
        entries.append((inner, ("model.", "")))
    for key, scopes in _SUBMODELS.items():
        submodel = config.get(key)
        model_type = str(submodel.get("model_type")) if isinstance(submodel, Mapping) else ""
        names = (model_type, _VISION_CLASSES.get(model_type, model_type))
        entries += [(name, scopes) for name in names if name in known][:1]
    return [
        _Transform(tuple(sources), tuple(targets), tuple(operations), scopes)
        for name, scopes in dict.fromkeys(entries)
        for sources, targets, operations in _table()["sets"][known[name]]
    ]


def loaded_name(config: Mapping[str, Any], name: str) -> tuple[str, int | None, int] | None:
    """Return what a stored name becomes, its expert (None: not a stack) and its index in the concatenation; or None."""
    transforms = transforms_of(config)
    new = _apply_renamings(transforms, name)
    converter = _find_converter(transforms, new)
    if converter is None:
        return (new, None, 0) if new != name else None
    transform, target, source = converter
    numbers = re.findall(r"experts\.(\d+)\.", new)
    return (target, int(numbers[-1]) if numbers else None, source) if list(transform.operations) in _EXPERTS else None


def canonical_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name -> its name in the model that transformers 5 loads, without stacking or splitting of tensors."""
    transforms = transforms_of(config)
    return {name: _apply_renamings(transforms, name) for name in names}


def loaded_tensors(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, tuple[LoadedSlice, ...]]:
    """Tensors of the loaded model that the checkpoint names or stores differently: loaded name -> its slices.

    `shapes`: of the checkpoint's tensors. Only renaming, and stacking, splitting and concatenating of rows are
    covered. Other conversions (rope permutations, transpositions) are left out, as their rows cannot be located.
    """
    transforms = transforms_of(config)
    loaded: dict[str, list[LoadedSlice]] = {}
    groups: dict[tuple[str, _Transform], list[tuple[int, str]]] = {}
    for name in shapes if transforms else ():
        new = _apply_renamings(transforms, name)
        converter = _find_converter(transforms, new)
        if converter is None:
            if new != name:
                loaded[new] = [LoadedSlice(name, shapes[name][0] if shapes[name] else 1)]
        else:
            transform, target, source = converter
            groups.setdefault((target, transform), []).append((source, name))
    for (target, transform), members in groups.items():
        loaded |= _converted_slices(target, transform, members, shapes)
    return {name: tuple(slices) for name, slices in loaded.items()}


def _apply_renamings(transforms: Iterable[_Transform], name: str) -> str:
    for transform in transforms:
        if not transform.operations and (match := transform.match(name)):
            name = match[0]
    return name


def _find_converter(transforms: Iterable[_Transform], name: str) -> tuple[_Transform, str, int] | None:
    for transform in transforms:
        if transform.operations and (match := transform.match(name)):
            return transform, *match
    return None


def _converted_slices(
    target: str, transform: _Transform, members: list[tuple[int, str]], shapes: Mapping[str, Shape]
) -> dict[str, list[LoadedSlice]]:
    operations = list(transform.operations)
    members = sorted(
        members, key=lambda item: (item[0], [int(word) if word.isdecimal() else 0 for word in item[1].split(".")])
    )
    if operations in _EXPERTS:
        return {target: _expert_slices(members, shapes)}
    if operations == ["Concatenate0"]:
        return {target: _concatenated_slices(members, shapes)}
    if operations == ["Chunk0"] and len(members) == 1:
        name = members[0][1]
        rows = shapes[name][0] // len(transform.targets)
        names = [target.replace(transform.targets[0], new, 1) for new in transform.targets]
        return {loaded: [LoadedSlice(name, rows, stored_start=at * rows)] for at, loaded in enumerate(names)}
    return {}


def _expert_slices(members: list[tuple[int, str]], shapes: Mapping[str, Shape]) -> list[LoadedSlice]:
    """The slices of stacked experts; within an expert, the rows of one source follow those of the other."""
    slices: list[LoadedSlice] = []
    offset = 0
    for source in dict.fromkeys(source for source, _ in members):
        names = [name for at, name in members if at == source]
        rows = shapes[names[0]][0]
        slices += [LoadedSlice(name, rows, loaded_start=offset, expert=expert) for expert, name in enumerate(names)]
        offset += rows
    return slices


def _concatenated_slices(members: list[tuple[int, str]], shapes: Mapping[str, Shape]) -> list[LoadedSlice]:
    slices: list[LoadedSlice] = []
    for _, name in members:
        slices.append(LoadedSlice(name, shapes[name][0], loaded_start=sum(piece.rows for piece in slices)))
    return slices
