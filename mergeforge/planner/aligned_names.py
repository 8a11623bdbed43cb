"""One model's tensors under the names of another: other versions of transformers, other prefixes.

A checkpoint names its tensors as the Hub's file of that class does, or as the class in memory does, which differ for
many vision-language models; and the class without a head lacks a prefix (`transformer.`, `bert.`, `model.`) that the
class with one has. Shapes are compared later, as for all models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from mergeforge.adapters.peft.hf_renames import LoadedSlice, canonical_names, loaded_tensors
from mergeforge.adapters.peft.keys import find_tensor
from mergeforge.checkpoints.model import ModelSource
from mergeforge.errors import format_list
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stacked import StackedTensor
from mergeforge.tensors.stored import StoredTensor


def aligned(model: ModelSource, reference: ModelSource) -> ModelSource:
    """The model with the reference's tensor names where only names and stacking differ, and notes on that."""
    if model is reference or all(name in reference.tensors for name in model.tensors):
        return model
    shapes = {name: tensor.info.shape for name, tensor in reference.tensors.items()}
    architectures = reference.config.get("architectures") or model.config.get("architectures")
    config = {**reference.config, "architectures": architectures}
    loaded = {
        name: slices
        for name, slices in loaded_tensors(config, shapes).items()
        if len(slices) > 1 and name not in shapes
    }
    stacks = _stacked_tensors(model, reference, config)
    stacked = {part.info.name for stack in stacks.values() for part in stack.parts}
    own = {**{name: tensor for name, tensor in model.tensors.items() if name not in stacked}, **stacks}
    names = aligned_names(own, [*shapes, *loaded], config)
    tensors = {names.get(name, name): _renamed(tensor, names.get(name, name)) for name, tensor in own.items()}
    notes = []
    if names:
        first, theirs = next(iter(names.items()))
        text = f"{model.label}: {len(names)} tensors are merged under the names that {reference.label} has for them"
        notes.append(f"{text} ({first} as {theirs})")
    if stacks:
        notes.append(f"{model.label}: {len(stacked)} tensors are stacked as {reference.label} stores them")
    if fused := _fused_tensors(tensors, loaded, reference):
        for name, parts in fused.items():
            del tensors[name]
            tensors |= parts
        notes.append(f"{model.label}: {format_list(fused, 1)} is split as {reference.label} stores it")
    return replace(model, tensors=tensors, warnings=(*model.warnings, *notes)) if notes else model  # type: ignore[type-var]


def _stacked_tensors(model: ModelSource, reference: ModelSource, config: Mapping[str, Any]) -> dict[str, StackedTensor]:
    """Tensor that the reference stores whole (experts, or q, k and v) -> it, stacked from the model's pieces of it."""
    shapes = {name: tensor.info.shape for name, tensor in model.tensors.items()}
    stacks = {}
    for name, slices in loaded_tensors(config, shapes).items():
        parts = [
            tensor
            for piece in sorted(slices, key=lambda piece: (piece.expert or 0, piece.loaded_start))
            if isinstance(tensor := model.tensors[piece.name], StoredTensor) and piece.name not in reference.tensors
        ]
        theirs = find_tensor(name, reference.tensors)
        if 1 < len(parts) == len(slices) and len(theirs) == 1 and len({part.info.dtype for part in parts}) == 1:
            shape = _stacked_shape(slices, parts)
            if shape == reference.tensors[theirs[0]].info.shape:
                stacks[name] = StackedTensor(tuple(parts), replace(parts[0].info, name=name, shape=shape))
    return stacks


def _stacked_shape(slices: Sequence[LoadedSlice], parts: Sequence[StoredTensor]) -> tuple[int, ...]:
    """(experts, rows, columns) of stacked experts, (rows, columns) of others; () if the columns differ."""
    experts = {piece.expert for piece in slices}
    rows = sum(part.info.shape[0] for part in parts)
    rest = {part.info.shape[1:] for part in parts}
    if len(rest) > 1 or rows % len(experts):
        return ()
    return (*([] if None in experts else [len(experts)]), rows // len(experts), *rest.pop())


def _fused_tensors(
    tensors: Mapping[str, LazyTensor], loaded: Mapping[str, tuple[LoadedSlice, ...]], reference: ModelSource
) -> dict[str, dict[str, LazyTensor]]:
    """Tensor that the reference stores in pieces (experts, or q, k and v) -> those pieces of it."""
    fused: dict[str, dict[str, LazyTensor]] = {}
    for name, slices in loaded.items():
        tensor = tensors.get(name)
        if isinstance(tensor, StoredTensor):
            parts = [_piece(tensor, piece, reference.tensors[piece.name].info.shape) for piece in slices]
            if sum(part.info.numel for part in parts) == tensor.info.numel:
                fused[name] = {part.info.name: part for part in parts}
    return fused


def _piece(tensor: StoredTensor, piece: LoadedSlice, shape: tuple[int, ...]) -> StoredTensor:
    """The rows of a fused tensor that the reference stores as one tensor of this shape."""
    rows_per_expert = tensor.info.shape[1] if piece.expert is not None else 0
    first = (piece.expert or 0) * rows_per_expert + piece.loaded_start
    info = replace(tensor.info, name=piece.name, shape=shape)
    return StoredTensor(info, tensor.file, tensor.offset + first * tensor.info.row_nbytes)


def aligned_names(names: Collection[str], reference: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Own name -> the reference's name, for tensors whose names differ. `config`: the reference's."""
    known, own = set(reference), set(names)
    unknown = [name for name in names if name not in known]
    free = [name for name in reference if name not in own]
    if not unknown or not free:
        return {}
    canonical = canonical_names(config, [*unknown, *free])
    by_canonical = {canonical[name]: name for name in free}
    result = {name: by_canonical[canonical[name]] for name in unknown if canonical[name] in by_canonical}
    left = {canonical[name]: name for name in unknown if name not in result}
    for name in result.values():
        del by_canonical[canonical[name]]
    result |= {left[name]: by_canonical[other] for name, other in _by_prefix(left, by_canonical).items()}
    return result if len(set(result.values())) == len(result) else {}


def _by_prefix(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """name -> other name, for the one prefix that most of the names differ by; none if two prefixes fit equally."""
    added = Counter(other[: -len(name)] for name, other in _suffixes(names, others))
    removed = Counter(name[: -len(other)] for other, name in _suffixes(others, names))
    best = [*added.most_common(2), *removed.most_common(2)]
    most = max((count for _, count in best), default=0)
    if not most or sum(count == most for _, count in best) > 1:
        return {}
    if added and added.most_common(1)[0][1] == most:
        prefix = added.most_common(1)[0][0]
        return {name: prefix + name for name in names if prefix + name in others}
    prefix = removed.most_common(1)[0][0]
    return {prefix + other: other for other in others if prefix + other in names}


def _suffixes(short: Collection[str], long: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name of `short`, name of `long` that ends with it after a dot)."""
    for name in long:
        at = name.find(".")
        while at >= 0:
            if name[at + 1 :] in short:
                yield name[at + 1 :], name
            at = name.find(".", at + 1)


def _renamed(tensor: LazyTensor, name: str) -> LazyTensor:
    if tensor.info.name == name:
        return tensor
    if is_dataclass(tensor) and any(field.name == "info" for field in fields(tensor)):
        return replace(tensor, info=tensor.info.renamed(name))
    return AliasTensor(tensor, tensor.info.renamed(name))
