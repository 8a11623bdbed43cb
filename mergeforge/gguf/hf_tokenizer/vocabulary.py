"""The vocabulary of a GGUF file, read from its keys and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Value, is_utf8
from mergeforge.gguf.reader import GGUFHeader
from mergeforge.gguf.vocab.tokens import CONTROL, NORMAL, UNUSED, USER_DEFINED

_HINT = "the file is damaged or incomplete: download it again, or use the model that it was made from"
# role in transformers -> its keys in GGUF, the first that is there counts
_ROLES = {
    "bos": ("bos",),
    "eos": ("eos",),
    "unk": ("unknown",),
    "pad": ("padding",),
    "sep": ("seperator", "separator"),
    "cls": ("cls",),
    "mask": ("mask",),
}
_SWITCHES = (
    *("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"),
    *("normalizer.lowercase", "normalizer.strip_accents"),
)
# What llama.cpp takes where the keys are absent (src/llama-vocab.cpp, b11549).
_USUAL = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "bert": {"cls": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}


@dataclass(frozen=True)
class StoredVocabulary:
    """Tokens by id with their types and scores, merges, and the other keys of a vocabulary."""

    path: Path
    header: GGUFHeader
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]

    def get(self, name: str) -> Any:
        """The value of `tokenizer.ggml.NAME`."""
        return self.header.get(f"tokenizer.ggml.{name}")

    @cached_property
    def roles(self) -> dict[str, int]:
        """The ids of special tokens by their roles in transformers: bos, eos, unk, pad, sep, cls, mask."""
        usual = {role: token for role, token in _USUAL.get(self.get("model"), {}).items() if token < len(self.tokens)}
        roles = usual | {role: token for role, token in self._stored_roles.items() if 0 <= token < len(self.tokens)}
        if self.get("model") == "bert":  # whose [CLS] and [SEP] are GGUF's BOS and EOS
            same = {"cls": roles.get("bos"), "sep": roles.get("eos")}
            roles = {**{role: token for role, token in same.items() if token is not None}, **roles}
        return roles

    @property
    def notes(self) -> list[str]:
        """Warnings about special tokens that the vocabulary does not have; llama.cpp ignores them too."""
        wrong = {role: token for role, token in self._stored_roles.items() if role not in self.roles}
        return [
            WarningText(
                f"{self.path.name}: its {role} token is {token}, but there are {len(self.tokens)} tokens: left out"
            )
            for role, token in wrong.items()
        ]

    @cached_property
    def _stored_roles(self) -> dict[str, int]:
        found = {
            role: next((token for name in names if isinstance(token := self.get(f"{name}_token_id"), int)), None)
            for role, names in _ROLES.items()
        }
        return {role: token for role, token in found.items() if token is not None}

    @property
    def ids(self) -> dict[str, int]:
        """The tokens of the model's own vocabulary; rows without a token are left out."""
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if not (kind == UNUSED and token.startswith("[PAD"))
        }

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """tokenizer.json's added tokens: those that are cut out of a text before it is split."""
        return [
            {"id": index, "content": token, **_FLAGS, "special": kind == CONTROL}
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED) and token
        ]


_SETTING_KINDS: dict[str, Callable[[Value], bool]] = {
    "UTF-8 text": lambda value: value.kind == "string" and is_utf8(value.value),
    "an array of bytes": lambda value: value.items in ("u8", "i8"),
    "true or false": lambda value: value.kind == "bool",
}
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def read_vocabulary(header: GGUFHeader, path: Path) -> StoredVocabulary:
    """Read and check a vocabulary. Raises SourceError."""
    tokens = _array(header, path, "tokens", str)
    if not tokens:
        raise SourceError(f"{path} has no tokens", hint=_HINT)
    if odd := next((index for index, token in enumerate(tokens) if not is_utf8(token)), None):
        raise SourceError(f"{path}: token {odd} is not UTF-8", hint=_HINT)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != len(tokens):
        text = f"{path} has {len(tokens)} tokens, but token_embd.weight has {embedding.shape[0]} rows"
        raise SourceError(text, hint=_HINT)
    types = _array(header, path, "token_type", int) or (NORMAL,) * len(tokens)
    scores = _array(header, path, "scores", (int, float)) or (0.0,) * len(tokens)
    for name, values in (("token_type", types), ("scores", scores)):
        if len(values) != len(tokens):
            text = f"{path} has {len(tokens)} tokens, but {len(values)} values in tokenizer.ggml.{name}"
            raise SourceError(text, hint=_HINT)
    if not all(map(math.isfinite, scores)):
        raise SourceError(f"{path}: tokenizer.ggml.scores has values that are not finite", hint=_HINT)
    _check_settings(header, path)
    return StoredVocabulary(path, header, tokens, types, scores, _merges(header, path))


def _check_settings(header: GGUFHeader, path: Path) -> None:
    """Raise SourceError for a chat template that is not text, and other settings of the wrong type."""
    for key, value in header.keys.items():
        if (kind := _setting_kind(key)) and not _SETTING_KINDS[kind](value):
            raise SourceError(f"{path}: {key} is not {kind}", hint=_HINT)


def _setting_kind(key: str) -> str:
    """What the value of a key must be; "" for keys that are checked where they are read."""
    if f"{key}.".startswith("tokenizer.chat_template."):
        return "UTF-8 text"
    name = key.removeprefix("tokenizer.ggml.")
    if name == "precompiled_charsmap":
        return "an array of bytes"
    return "true or false" if name in _SWITCHES else ""


def _array(header: GGUFHeader, path: Path, name: str, kind: Any) -> tuple[Any, ...]:
    values = header.get(f"tokenizer.ggml.{name}")
    if values is None:
        return ()
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values[:1]):
        raise SourceError(f"{path}: tokenizer.ggml.{name} is not an array of the right type", hint=_HINT)
    return values


def _merges(header: GGUFHeader, path: Path) -> tuple[tuple[str, str], ...]:
    merges = []
    for merge in _array(header, path, "merges", str):
        left, space, right = merge.partition(" ")
        if merge.startswith(" "):  # of raw text the left side may begin with a space
            left, space, right = merge[0] + merge[1:].partition(" ")[0], " ", merge[1:].partition(" ")[2]
        if not space or not left or not right or not is_utf8(merge):
            raise SourceError(f"{path}: {merge!r} in tokenizer.ggml.merges is not a merge of two tokens", hint=_HINT)
        merges.append((left, right))
    return tuple(merges)
