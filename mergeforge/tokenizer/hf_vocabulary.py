"""A model's tokens and their ids, as transformers finds them in the files of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.errors import SourceError, format_list, malformed_as_source_error
from mergeforge.tokenizer.hf_files import added_tokens, named_tokens, read_object
from mergeforge.tokenizer.settings import ModelTokenizer

Flags = Mapping[str, bool]  # how an added token is matched in a text

MAX_TOKENS = 1 << 26


@dataclass(frozen=True)
class ModelVocabulary:
    """The tokens of a model's tokenizer.

    `ids`: every token's id. `model_ids`: the ids of the vocabulary without added tokens (tokenizer.json's "model").
    `added`: the flags of added tokens, in the order of their ids. `roles`: role -> token (`eos`).
    `unnamed_special`: special tokens without a role.
    """

    model: ModelTokenizer
    ids: Mapping[str, int]
    model_ids: Mapping[str, int]
    added: Mapping[str, Flags]
    roles: Mapping[str, str]
    unnamed_special: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.model.label

    def row(self, token: str) -> int:
        """The token's row of the embedding; -1 for a token that has none."""
        number = self.ids.get(token, -1)
        return number if number < self.model.rows else -1

    @property
    def rowless(self) -> list[str]:
        """Added tokens that have no row in the embedding."""
        return [token for token in self.added if self.ids[token] >= self.model.rows]


def read_vocabulary(model: ModelTokenizer) -> ModelVocabulary:
    """Read a model's tokenizer files. Raises SourceError if they are missing or do not fit its embedding."""
    tokenizer = read_object(model.files, "tokenizer.json")
    config = read_object(model.files, "tokenizer_config.json") or {}
    special_map = read_object(model.files, "special_tokens_map.json") or {}
    model_ids, stored = _of_tokenizer_json(tokenizer, model) if tokenizer is not None else _of_vocab_json(model)
    with malformed_as_source_error(model.files.get("tokenizer_config.json", "tokenizer_config.json")):
        named = named_tokens(config, special_map)
        added = added_tokens(model_ids, stored, config, special_map)
    ids = {**model_ids, **{text: token.number for text, token in added.items()}}
    flags = {text: added[text].flags for text in sorted(added, key=lambda text: ids[text])}
    vocabulary = ModelVocabulary(model, ids, model_ids, flags, named.role_texts, named.unnamed_texts)
    _check_rows(vocabulary)
    return vocabulary


def assign_added_ids(model_ids: Mapping[str, int], added: Iterable[str]) -> dict[str, int]:
    """The ids that the tokenizers library gives added tokens, in their order (added_vocabulary.rs, add_tokens)."""
    ids: dict[str, int] = {}
    free = len(model_ids)
    for text in added:
        ids[text] = model_ids.get(text, free)
        free = max(free, ids[text] + 1)
    return ids


def save_again_hint(model: ModelTokenizer) -> str:
    """What to do about a missing tokenizer.json."""
    how = "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
    return f"put it beside the weights of {model.label}; {how}"


def _of_tokenizer_json(
    tokenizer: Mapping[str, Any], model: ModelTokenizer
) -> tuple[dict[str, int], list[Mapping[str, Any]]]:
    """The vocabulary and the added tokens of tokenizer.json."""
    path = model.files["tokenizer.json"]
    inner = tokenizer.get("model")
    vocab = inner.get("vocab") if isinstance(inner, dict) else None
    try:
        model_ids = (
            {str(text): int(number) for text, number in vocab.items()}
            if isinstance(vocab, dict)
            else {str(entry[0]): number for number, entry in enumerate(vocab or ())}
        )
        entries = tokenizer.get("added_tokens") or ()
        stored: list[Mapping[str, Any]] = [{**entry, "content": str(entry["content"])} for entry in entries]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise SourceError(f"{path}: its vocabulary cannot be read: {error!r}") from None
    if min(model_ids.values(), default=0) < 0:
        raise SourceError(f"{path} has tokens with negative ids", hint="save the tokenizer again")
    if not model_ids and not stored:
        raise SourceError(f"{path} contains no tokens", hint="save the tokenizer again")
    return model_ids, stored


def _of_vocab_json(model: ModelTokenizer) -> tuple[dict[str, int], list[Mapping[str, Any]]]:
    """The older files of GPT-2 and Qwen: vocab.json, merges.txt and added_tokens.json."""
    vocab = read_object(model.files, "vocab.json")
    if vocab is None:
        unsupported = ("tokenizer.model", "spiece.model", "vocab.txt", "tekken.json")
        present = [name for name in unsupported if name in model.files]
        only = f", only {format_list(present)}" if present else ""
        raise SourceError(f"{model.label} has no tokenizer.json{only}", hint=save_again_hint(model))
    extra = read_object(model.files, "added_tokens.json") or {}
    if bad := [text for text, number in {**vocab, **extra}.items() if not isinstance(number, int) or number < 0]:
        raise SourceError(f"{model.files['vocab.json']}: tokens without an id: {format_list(map(repr, bad))}")
    return vocab, [{"content": text} for text in sorted(extra, key=lambda text: extra[text])]


def _check_rows(vocabulary: ModelVocabulary) -> None:
    """An embedding may lack rows for added tokens, but not for the vocabulary that texts are made of."""
    model = vocabulary.model
    outside = sorted((number, text) for text, number in vocabulary.model_ids.items() if number >= model.rows)
    outside = [(number, text) for number, text in outside if text not in vocabulary.added or number >= MAX_TOKENS]
    if outside or not model.rows:
        shown = format_list(f"{text!r} ({number})" for number, text in outside)
        raise SourceError(
            f"{model.label}: its tokenizer has more tokens than its embedding has rows ({model.rows}): {shown}",
            hint="use the tokenizer that belongs to these weights",
        )
