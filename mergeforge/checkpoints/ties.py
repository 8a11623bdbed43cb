"""Ties: tensors of a model that are one parameter under several names.

Which names a class ties is taken from transformers itself (hf_classes.json). What a
checkpoint ties also depends on what it stores, and the rule is that of transformers 5 (PreTrainedModel.tie_weights):
if the flag is set, a name that is not stored takes the tensor of one that is; names that are stored keep their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.checkpoints.hf_classes import class_entry
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import EMBEDDINGS, HEADS, class_names, is_head
from mergeforge.tensors.lazy import LazyTensor

FLAG = "tie_word_embeddings"
_GENERATIVE = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "DecoderModel",
)
_TOKEN_MODULES = (*EMBEDDINGS, *HEADS)


@dataclass(frozen=True)
class Tie:
    """The names of one tensor, as the checkpoint has or would have them; transformers fills the first one first.

    stored: those that the checkpoint has, at least one.
    """

    names: tuple[str, ...]
    stored: tuple[str, ...]

    @property
    def origin(self) -> str:
        """The name whose tensor is taken for names that are not stored."""
        return self.names[0] if self.names[0] in self.stored else self.stored[0]


@dataclass(frozen=True)
class ModelTies:
    """What is tied in a model.

    ties: none where the config's flag says so. embedding, head: names of the input and output embedding, "" if unknown.
    token_rows: names of all tensors with an entry for each token, such as a head's bias. known: whether transformers
    has the class; without it, ties are guessed from names. keeps_flag: tie_word_embeddings must not be changed, because
    the class ties whatever it says, or computes something else by it. patterns: regular expressions of further ties.
    """

    ties: tuple[Tie, ...] = ()
    embedding: str = ""
    head: str = ""
    token_rows: tuple[str, ...] = ()
    known: bool = True
    keeps_flag: bool = False
    patterns: tuple[str, ...] = ()

    def has_token_rows(self, name: str) -> bool:
        """Whether a tensor has an entry for each token: an embedding, a head, its bias."""
        return name in self.token_rows or (name.endswith(".weight") and name.split(".")[-2] in _TOKEN_MODULES)

    def of(self, name: str) -> Tie | None:
        """The tie that a name belongs to."""
        return next((tie for tie in self.ties if name in tie.names), None)

    @property
    def head_tie(self) -> Tie | None:
        """The tie of the output embedding."""
        return self.of(self.head) if self.head else None


def model_ties(model: ModelSource) -> ModelTies:
    """What is tied in a model, by its class, its config's flag and the tensors that it stores."""
    entry = class_entry(model.config)
    if entry is None:
        return _guessed_ties(model)
    if not entry:
        return ModelTies()
    names = _ModelNames(model.tensors, str(entry.get("prefix", "")))
    groups = [[names.find(name) for name in group] for group in entry["ties"]]
    untied_rows = [names.find(name) for name in entry.get("vocabulary", ())]
    head, embedding = (names.find(entry[key]) if key in entry else "" for key in ("output", "input"))
    if _lacks_head(model.tensors, groups, untied_rows, head):
        groups, head = [[name for name in group if name != head] for group in groups], ""
    ties = [Tie(tuple(group), tuple(name for name in group if name in model.tensors)) for group in groups]
    is_tied = _is_tied(model, entry, head)
    return ModelTies(
        tuple(tie for tie in ties if tie.stored and len(tie.names) > 1) if is_tied else (),
        embedding,
        head,
        tuple(dict.fromkeys([*_names_by_token(groups, embedding, head), *untied_rows])),
        keeps_flag="always" in entry or "computes_by_flag" in entry,
        patterns=tuple(pattern for pair in entry.get("patterns", ()) for pattern in pair),
    )


def tied_head(model: ModelSource) -> tuple[str, str] | None:
    """The names (head, embedding) of a model whose output embedding is its input embedding, or None."""
    found = model_ties(model)
    tie = found.head_tie
    if tie is None:
        return None
    embedding = next((name for name in (found.embedding, *tie.stored) if name in tie.stored and name != found.head), "")
    return (found.head, embedding) if embedding else None


@dataclass(frozen=True)
class _ModelNames:
    """A checkpoint's names for those of its class. `prefix`: of the model under the head (base_model_prefix)."""

    tensors: Mapping[str, LazyTensor]
    prefix: str

    def find(self, name: str) -> str:
        """The checkpoint's name for a tensor; if it is not stored, the name that it would have."""
        inner = name.removeprefix(f"{self.prefix}.")
        for candidate in (name, inner, f"{self.prefix}.{name}"):
            if candidate in self.tensors:
                return candidate
        module, _, leaf = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last in _TOKEN_MODULES and not {"encoder", "decoder"} & set(name.split(".")):
            alike = [one for one in self.tensors if one.endswith(f".{last}.{leaf}") and not _is_tower(one)]
            if len(alike) == 1:
                return alike[0]
        return inner if self._lacks_prefix else name

    @property
    def _lacks_prefix(self) -> bool:
        return bool(self.prefix) and not any(name.startswith(f"{self.prefix}.") for name in self.tensors)


def _is_tower(name: str) -> bool:
    return any(word in name for word in ("vision", "visual", "audio"))


def _lacks_head(tensors: Mapping[str, LazyTensor], groups: list[list[str]], untied_rows: list[str], head: str) -> bool:
    """Whether the checkpoint holds a model without its head: a head's bias is always stored."""
    biases = [[name for name in group if name.endswith(".bias")] for group in [*groups, untied_rows]]
    return bool(head) and head not in tensors and any(names and not set(names) & tensors.keys() for names in biases)


def _names_by_token(groups: list[list[str]], embedding: str, head: str) -> list[str]:
    """The embedding, the head, what is tied to them, and the biases of a head that are tied to each other."""
    module = head.rpartition(".")[0]
    groups = [group for group in groups if {embedding, head} & set(group) or f"{module}.bias" in group]
    return [name for name in (embedding, head, *(name for group in groups for name in group)) if name]


def _flags(config: Mapping[str, Any]) -> Iterator[bool]:
    """The flags in a config and in those inside it."""
    if isinstance(flag := config.get(FLAG), bool):
        yield flag
    for inner in config.values():
        if isinstance(inner, Mapping):
            yield from _flags(inner)


def _is_tied(model: ModelSource, entry: Mapping[str, Any], head: str) -> bool:
    if "always" in entry:
        return True
    text = model.config.get("text_config")
    parts = [model.config, *([text] if isinstance(text, Mapping) else [])]
    flags = [part[FLAG] for part in parts if isinstance(part.get(FLAG), bool)]
    if flags:
        return any(flags)
    return bool(entry["tied_by_default"]) or bool(head and head not in model.tensors)


def _guessed_ties(model: ModelSource) -> ModelTies:
    """The tie of head and embedding in a class that transformers does not have, by their usual names."""
    heads = [name for name in model.tensors if is_head(name)]
    flags = list(_flags(model.config))
    generates = any(name.endswith(_GENERATIVE) for name in class_names(model.config))
    embeddings = [name for name in model.tensors if name.endswith(".weight") and name.split(".")[-2:-1] and
                  name.split(".")[-2] in EMBEDDINGS]  # fmt: skip
    if not embeddings or not (any(flags) or (generates and not heads)):
        return ModelTies(known=False)
    embedding = embeddings[0]
    head = heads[0] if heads else re.sub(r"^(.*\.)?(\w+)\.weight$", "lm_head.weight", embedding)
    tie = Tie((embedding, head), tuple(name for name in (embedding, head) if name in model.tensors))
    return ModelTies((tie,), embedding, head, known=False)
