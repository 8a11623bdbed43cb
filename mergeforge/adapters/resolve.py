"""Find the base's tensor for a path that an adapter names, or explain why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import NoReturn

from mergeforge.adapters.peft.hf_renames import LoadedSlice, canonical_names, loaded_name, loaded_tensors
from mergeforge.adapters.peft.keys import find_tensor
from mergeforge.checkpoints.hf_classes import class_entry, class_with_prefix
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import EMBEDDINGS, HEADS, is_head
from mergeforge.checkpoints.ties import ModelTies, model_ties
from mergeforge.errors import SourceError, format_list
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

_WRAPPED = ".base_layer."  # PEFT's wrapper of nn.MultiheadAttention stays in the paths of the layers inside it
MAX_LISTED = 5  # mismatches that one error lists


class MatchError(Exception):
    """A tensor of the adapter that matches no tensor of the base, or has the wrong shape. All are collected first."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint


@dataclass
class TensorResolver:
    """The base's tensors, by an adapter's paths.

    `resized`: base tensors that the adapter replaces in another size. `aliases`: paths of the adapter's format that
    are rows of stored tensors.
    """

    label: str
    base: ModelSource
    resized: dict[str, LazyTensor]
    aliases: Mapping[str, tuple[LoadedSlice, ...]] = field(default_factory=dict)
    errors: list[MatchError] = field(default_factory=list)

    @contextmanager
    def collecting_errors(self) -> Iterator[None]:
        """Record a MatchError instead of raising it."""
        try:
            yield
        except MatchError as error:
            self.errors.append(error)

    def check(self) -> None:
        """Raises SourceError with the errors that were collected."""
        if self.errors:
            texts = list(dict.fromkeys(map(str, self.errors)))
            more = f"; and {len(texts) - MAX_LISTED} more" if len(texts) > MAX_LISTED else ""
            raise SourceError(f"{self.label}: {'; '.join(texts[:MAX_LISTED])}{more}", hint=self.errors[0].hint)

    @cached_property
    def ties(self) -> ModelTies:
        """What is tied in the base."""
        return model_ties(self.base)

    @cached_property
    def _not_stored(self) -> tuple[str, ...]:
        """The names of tied tensors that the base does not store."""
        return tuple(name for tie in self.ties.ties for name in tie.names if name not in tie.stored)

    @cached_property
    def loaded(self) -> Mapping[str, tuple[LoadedSlice, ...]]:
        """Tensors that transformers 5 names or stores differently than the checkpoint, with their stored slices."""
        shapes = {name: tensor.info.shape for name, tensor in self.base.tensors.items()}
        return {**loaded_tensors(self.base.config, shapes), **self.aliases}

    def find(self, path: str) -> str:
        """The base's tensor for an adapter's path; "" if there is none."""
        names = find_tensor(path, self.base.tensors)
        if not names and len(tied := find_tensor(path, self._not_stored)) == 1:
            return tied[0]
        if not names and self.ties.head in self._not_stored and is_head(path):
            return self.ties.head
        if not names and _WRAPPED in path:
            return self.find(path.replace(_WRAPPED, "."))
        if not names and len(slices := self._loaded_slices(path)) == 1 and self._is_whole(slices[0]):
            return slices[0].name
        if not names:
            names = self._by_canonical_name(path)
        if len(names) > 1:
            raise SourceError(
                f"{self.label}: {path} is ambiguous in {self.base.label}: it matches {format_list(names)}"
            )
        return names[0] if names else ""

    @cached_property
    def _canonical(self) -> Mapping[str, str]:
        """Name in the model that transformers 5 loads -> the base's name, where a checkpoint of any version has it."""
        return {new: name for name, new in canonical_names(self.base.config, self.base.tensors).items()}

    def _by_canonical_name(self, path: str) -> list[str]:
        """The base's tensors that another version of transformers names as the path does."""
        new = canonical_names(self.base.config, [path])[path]
        return [self._canonical[name] for name in find_tensor(new, self._canonical)]

    def require(self, path: str, stored: StoredTensor) -> str:
        """The base's tensor for an adapter's path. Raises MatchError if there is none."""
        name = self.find(path)
        if not name:
            self.refuse_unknown(stored, path)
        return name

    def target(self, name: str) -> LazyTensor:
        """The tensor that the deltas apply to: the base's, or the resized one that the adapter saved."""
        if name in self.resized:
            return self.resized[name]
        if name in self.base.tensors:
            return self.base.tensors[name]
        tie = self.ties.of(name)
        assert tie is not None
        return self.resized.get(tie.origin, self.base.tensors[tie.origin])

    def slices(self, path: str) -> tuple[LoadedSlice, ...]:
        """The stored slices of a tensor that the checkpoint holds in pieces, or as a piece of another tensor."""
        return () if self.find(path) else self._loaded_slices(path) or self._expert_slice(path)

    def _loaded_slices(self, path: str) -> tuple[LoadedSlice, ...]:
        names = find_tensor(path, self.loaded)
        return self.loaded[names[0]] if len(names) == 1 else ()

    def _expert_slice(self, path: str) -> tuple[LoadedSlice, ...]:
        """The slice of one expert, by its old name, in a checkpoint that stores the experts fused."""
        new = loaded_name(self.base.config, path)
        if new is None or new[1] is None:
            return ()
        stacks = find_tensor(new[0], self.base.tensors)
        if len(stacks) != 1 or len(self.base.tensors[stacks[0]].info.shape) != 3:
            return ()
        _, rows, _ = self.base.tensors[stacks[0]].info.shape
        half = rows // 2 if new[0].endswith("gate_up_proj") else rows
        return (LoadedSlice(stacks[0], half, stored_start=new[1] * rows + new[2] * half),)

    def _is_whole(self, piece: LoadedSlice) -> bool:
        return (
            piece.expert is None
            and piece.stored_start == 0
            and piece.rows == self.base.tensors[piece.name].info.shape[0]
        )

    def check_size(self, module: str, stored: StoredTensor, target: LazyTensor) -> None:
        """Check the shape; embeddings and heads may have another number of rows. Raises MatchError."""
        may_grow = module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS) or self.ties.has_token_rows(target.info.name)
        shape = (target.info.shape[0], *stored.info.shape[1:]) if may_grow else stored.info.shape
        if tuple(shape) != tuple(target.info.shape):
            self.refuse_shape(module, stored.info.shape, target)

    def check_same_shape(self, module: str, stored: StoredTensor, target: LazyTensor) -> None:
        """Raises MatchError."""
        if stored.info.shape != target.info.shape:
            self.refuse_shape(module, stored.info.shape, target)

    def refuse_shape(self, module: str, shape: tuple[int, ...], target: LazyTensor) -> NoReturn:
        """Raises MatchError."""
        theirs = f"{target.info.name} of {self.base.label} is {list(target.info.shape)}"
        hint = "the adapter was trained on another model, or on a resized vocabulary that was not saved with it"
        raise MatchError(f"{module} is made for shape {list(shape)}, but {theirs}", hint)

    def refuse_unknown(self, stored: StoredTensor, path: str) -> NoReturn:
        """Raises MatchError, or SourceError if all of the adapter's tensors must have the same problem."""
        if self.slices(path):
            text = (
                f"{stored.info.name!r} changes a part of a fused tensor of {self.base.label}, or one stored in pieces"
            )
            raise MatchError(text, "only plain LoRA can be folded into such a tensor")
        self._refuse_other_prefix(stored, path)
        nearest = get_close_matches(path, list(self.base.tensors), n=3, cutoff=0.5) if not self.errors else []
        hint = (
            f"nearest: {', '.join(nearest)}"
            if nearest
            else "is the adapter for this model, or for another class of it?"
        )
        raise MatchError(f"{stored.info.name!r} matches no tensor of {self.base.label}", hint)

    def _refuse_other_prefix(self, stored: StoredTensor, path: str) -> None:
        """Raise SourceError for an adapter of a class that transformers cannot fill with the base's tensors."""
        prefix, _, rest = path.partition(".")
        own = str((class_entry(self.base.config) or {}).get("prefix", ""))
        name = class_with_prefix(str(self.base.config.get("model_type")), f"{prefix}.") if prefix != own else ""
        if own and name and f"{own}.{rest}" in self.base.tensors:
            text = (
                f"{self.label} was trained on a {name}, whose tensors begin with '{prefix}.'. transformers does not "
                f"find these in {self.base.label}, where they begin with '{own}.', and takes random values instead"
            )
            hint = "name the model that it was trained on, such as this one saved without its head (with AutoModel)"
            raise SourceError(text, hint=hint)
