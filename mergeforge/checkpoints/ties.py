"""Ties: tensors of a model that are one parameter under several names.

Which names a class ties is taken from hf_ties.json (written by tools/hf_ties from transformers' own classes). What a
checkpoint ties also depends on what it stores, and the rule is that of transformers 5 (PreTrainedModel.tie_weights):
if the flag is set, a name that is not stored takes the tensor of one that is; names that are stored keep their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import EMBEDDINGS, HEADS, is_head
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
_TOKEN_MODULES = (*EMBEDDINGS, *HEADS, "shared")


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
    token_rows: names of other tensors with an entry for each token, such as a head's bias. known: whether transformers
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

    def of(self, name: str) -> Tie | None:
        """The tie that a name belongs to."""
        return next((tie for tie in self.ties if name in tie.names), None)

    @property
    def head_tie(self) -> Tie | None:
        """The tie of the output embedding."""
        return self.of(self.head) if self.head else None


def model_ties(model: ModelSource) -> ModelTies:
    """What is tied in a model, by its class, its config's flag and the tensors that it stores."""
    entry = _entry(model.config)
    if entry is None:
        return _guessed_ties(model)
    if not entry:
        return ModelTies()
    names = _ModelNames(model.tensors, str(entry.get("prefix", "")))
    groups = [[names.find(name) for name in group] for group in entry["ties"]]
    token_rows = tuple(names.find(name) for name in entry.get("vocabulary", ()))
    head, embedding = (names.find(entry[key]) if key in entry else "" for key in ("output", "input"))
    if _lacks_head(model.tensors, groups, token_rows, head):
        groups, head = [[name for name in group if name != head] for group in groups], ""
    ties = [Tie(tuple(group), tuple(name for name in group if name in model.tensors)) for group in groups]
    is_tied = _is_tied(model, entry, head)
    return ModelTies(
        tuple(tie for tie in ties if tie.stored and len(tie.names) > 1) if is_tied else (),
        embedding,
        head,
        token_rows,
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


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("hf_ties.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _entry(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the table says about the model's class: {} if it ties nothing, None if it is not in the table."""
    table = _table()
    names = [str(name) for name in config.get("architectures") or ()]
    name = names[0] if names else table["types"].get(str(config.get("model_type")), "")
    return table["entries"][table["of"][name]] if name in table["of"] else None


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


def _lacks_head(
    tensors: Mapping[str, LazyTensor], groups: list[list[str]], token_rows: tuple[str, ...], head: str
) -> bool:
    """Whether the checkpoint holds a model without its head: a head's bias is always stored."""
    biases = [[name for name in group if name.endswith(".bias")] for group in [*groups, list(token_rows)]]
    return bool(head) and head not in tensors and any(names and not set(names) & tensors.keys() for names in biases)


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
    generates = any(str(name).endswith(_GENERATIVE) for name in model.config.get("architectures") or ())
    embeddings = [name for name in model.tensors if name.endswith(".weight") and name.split(".")[-2:-1] and
                  name.split(".")[-2] in EMBEDDINGS]  # fmt: skip
    if not embeddings or not (any(flags) or (generates and not heads)):
        return ModelTies(known=False)
    embedding = embeddings[0]
    head = heads[0] if heads else re.sub(r"^(.*\.)?(\w+)\.weight$", "lm_head.weight", embedding)
    tie = Tie((embedding, head), tuple(name for name in (embedding, head) if name in model.tensors))
    return ModelTies((tie,), embedding, head, known=False)
