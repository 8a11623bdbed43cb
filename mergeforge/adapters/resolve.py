"""Homes: which tensor of the base each of an adapter's paths means, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import NoReturn

from mergeforge.adapters.peft.hf_renames import Part, loaded_name, loaded_tensors
from mergeforge.adapters.peft.keys import find_tensor
from mergeforge.checkpoints.checkpoint import ModelSource
from mergeforge.checkpoints.names import EMBEDDINGS, HEADS, is_head, tied_head
from mergeforge.errors import SourceError, listing
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

_WRAPPED = ".base_layer."  # PEFT's layer around nn.MultiheadAttention stays in the paths of what lies inside it
MOST = 5  # misfits that an error names


class MatchError(Exception):
    """A tensor of the adapter without a home, or one that does not fit it: all are looked for before the error."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint


@dataclass
class TensorResolver:
    """The base's tensors as an adapter names them. `resized`: those that the adapter brings in another size."""

    label: str
    base: ModelSource
    resized: dict[str, LazyTensor]
    misfits: list[MatchError] = field(default_factory=list)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Keep a misfit, and go on."""
        try:
            yield
        except MatchError as misfit:
            self.misfits.append(misfit)

    def check(self) -> None:
        """Raises SourceError with the misfits that were gathered."""
        if self.misfits:
            texts = list(dict.fromkeys(map(str, self.misfits)))
            more = f"; and {len(texts) - MOST} more" if len(texts) > MOST else ""
            raise SourceError(f"{self.label}: {'; '.join(texts[:MOST])}{more}", hint=self.misfits[0].hint)

    @cached_property
    def tied(self) -> tuple[str, str] | None:
        """(head, embedding) of the base where these are one tensor."""
        return tied_head(self.base)

    @cached_property
    def loaded(self) -> Mapping[str, tuple[Part, ...]]:
        """What transformers 5 calls the tensors that the checkpoint calls otherwise."""
        return loaded_tensors(self.base.config, {name: way.info.shape for name, way in self.base.tensors.items()})

    def find(self, path: str) -> str:
        """The base's tensor for an adapter's path; "" for none."""
        found = find_tensor(path, self.base.tensors)
        if not found and self.tied and is_head(path):
            return self.tied[0]
        if not found and _WRAPPED in path:
            return self.find(path.replace(_WRAPPED, "."))
        if not found and len(parts := self._parts(path)) == 1 and self._is_whole(parts[0]):
            return parts[0].name
        if len(found) > 1:
            raise SourceError(f"{self.label}: {path} may mean any of {listing(found)} of {self.base.label}")
        return found[0] if found else ""

    def name(self, path: str, stored: StoredTensor) -> str:
        """The base's tensor for a path that must have one. Raises Misfit."""
        found = self.find(path)
        if not found:
            self.refuse_unknown(stored, path)
        return found

    def target(self, name: str) -> LazyTensor:
        """The tensor that is edited: the base's, or what the adapter saved in its place."""
        if name in self.resized:
            return self.resized[name]
        if name in self.base.tensors:
            return self.base.tensors[name]
        assert self.tied is not None and name == self.tied[0]
        return self.resized.get(self.tied[1], self.base.tensors[self.tied[1]])

    def parts(self, path: str) -> tuple[Part, ...]:
        """Where a tensor of the loaded model lies, which the checkpoint holds in parts or as a part."""
        return () if self.find(path) else self._parts(path) or self._in_stack(path)

    def _parts(self, path: str) -> tuple[Part, ...]:
        found = find_tensor(path, self.loaded)
        return self.loaded[found[0]] if len(found) == 1 else ()

    def _in_stack(self, path: str) -> tuple[Part, ...]:
        """An expert's weight by its old name, where the checkpoint holds the experts fused."""
        new = loaded_name(self.base.config, path)
        found = find_tensor(new[0], self.base.tensors) if new else []
        if new is None or len(found) != 1 or new[1] is None or len(self.base.tensors[found[0]].info.shape) != 3:
            return ()
        _, rows, _ = self.base.tensors[found[0]].info.shape
        half = rows // 2 if new[0].endswith("gate_up_proj") else rows
        return (Part(found[0], half, start=new[1] * rows + new[2] * half),)

    def _is_whole(self, part: Part) -> bool:
        return part.expert is None and part.start == 0 and part.rows == self.base.tensors[part.name].info.shape[0]

    def check_size(self, module: str, stored: StoredTensor, target: LazyTensor) -> None:
        """The shape of the base's tensor, but for the rows of a vocabulary. Raises Misfit."""
        may_grow = module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)
        shape = (target.info.shape[0], *stored.info.shape[1:]) if may_grow else stored.info.shape
        if tuple(shape) != tuple(target.info.shape):
            self.refuse_shape(module, stored.info.shape, target)

    def check_same_shape(self, module: str, stored: StoredTensor, target: LazyTensor) -> None:
        """Raises Misfit."""
        if stored.info.shape != target.info.shape:
            self.refuse_shape(module, stored.info.shape, target)

    def refuse_shape(self, module: str, shape: tuple[int, ...], target: LazyTensor) -> NoReturn:
        """Raises Misfit."""
        theirs = f"{target.info.name} of {self.base.label} is {list(target.info.shape)}"
        hint = "the adapter was trained on another model, or its vocabulary was resized and not saved"
        raise MatchError(f"{module} is made for shape {list(shape)}, and {theirs}", hint)

    def refuse_unknown(self, stored: StoredTensor, path: str) -> NoReturn:
        """Raises Misfit."""
        near = get_close_matches(path, list(self.base.tensors), n=3, cutoff=0.5) if not self.misfits else []
        hint = f"nearest: {', '.join(near)}" if near else "the adapter belongs to another model"
        raise MatchError(f"{stored.info.name!r} matches no tensor of {self.base.label}", hint)
