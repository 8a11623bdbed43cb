"""ModelSource: a model as an input of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mergeforge.tensors.lazy import LazyTensor


class ModelSource(Protocol):
    """A model to merge: one that is stored in files, or the result of an earlier merge, which is stored nowhere."""

    @property
    def label(self) -> str:
        """The model's name in the recipe."""

    @property
    def folder(self) -> Path:
        """The folder of the files next to its weights."""

    @property
    def tensors(self) -> Mapping[str, LazyTensor]: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json; empty if there is none."""

    @property
    def warnings(self) -> tuple[str, ...]: ...


def config_ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether config.json (or its text_config) says that lm_head is tied to the embedding."""
    inner = config.get("text_config")
    flag = config.get("tie_word_embeddings")
    if flag is None and isinstance(inner, Mapping):
        flag = inner.get("tie_word_embeddings")
    return flag is True
