"""A model's tokens and their ids, as transformers finds them in the files of its tokenizer.

That is tokenizer.json's vocabulary and added tokens, changed by tokenizer_config.json: its `added_tokens_decoder`
wins over their flags, and a token that it names (`pad_token`) is added where there is none such. An added token that
the vocabulary lacks gets the id after the highest one (tokenizers, added_vocabulary.rs, add_tokens).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.errors import SourceError, listing
from mergeforge.io.aux_files import AuxFiles
from mergeforge.tokenizer.settings import TokenizerOf

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")

Flags = Mapping[str, bool]  # how an added token is matched in a text

MOST_TOKENS = 1 << 26


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer: `ids` of all tokens, `plain` those of its model alone, `added` tokens' flags in the ids' order.

    `named`: role -> token (`eos`); `listed`: special tokens without a role.
    """

    model: TokenizerOf
    ids: Mapping[str, int]
    plain: Mapping[str, int]
    added: Mapping[str, Flags]
    named: Mapping[str, str]
    listed: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.model.label

    def row(self, token: str) -> int:
        """The token's row of the embedding; -1 for a token that has none."""
        number = self.ids.get(token, -1)
        return number if number < self.model.rows else -1

    @property
    def rowless(self) -> list[str]:
        """Added tokens that the embedding has no row for."""
        return [token for token in self.added if self.ids[token] >= self.model.rows]


def read_vocabulary(model: TokenizerOf) -> Vocabulary:
    """Read a model's tokenizer files. Raises SourceError where they are missing or do not fit its embedding."""
    tokenizer = read_object(model.files, "tokenizer.json")
    config = read_object(model.files, "tokenizer_config.json") or {}
    special_map = read_object(model.files, "special_tokens_map.json") or {}
    if "added_tokens_decoder" not in config:
        config = {**config, **special_map}
    plain, entries = _of_json(tokenizer, model) if tokenizer is not None else _of_vocab_json(model)
    named = {role: text for role in _roles(config) if (text := _text(config.get(f"{role}_token")))}
    listed = _listed(config)
    added = _added(entries, config, [*named.values(), *listed])
    ids = {**plain, **added_ids(plain, added)}
    ordered = {text: added[text] for text in sorted(added, key=lambda text: ids[text])}
    found = Vocabulary(model, ids, plain, ordered, named, tuple(listed))
    _check_rows(found)
    return found


def added_ids(plain: Mapping[str, int], added: Iterable[str]) -> dict[str, int]:
    """The ids that the tokenizers library gives added tokens, in their order."""
    ids: dict[str, int] = {}
    free = len(plain)
    for text in added:
        ids[text] = plain.get(text, free)
        free = max(free, ids[text] + 1)
    return ids


def read_object(files: AuxFiles, name: str) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is no such file. Raises SourceError."""
    if name not in files:
        return None
    try:
        value = json.loads(files[name].read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        text = f"{files[name]} cannot be read as JSON: {error}"
        raise SourceError(text, hint="copy it from the model again") from None
    if not isinstance(value, dict):
        raise SourceError(f"{files[name]} is not a JSON object", hint="copy it from the model again")
    return value


def save_again(model: TokenizerOf) -> str:
    """What to do about a missing tokenizer.json."""
    how = "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
    return f"put it beside the weights of {model.label}; {how}"


def _of_json(tokenizer: Mapping[str, Any], model: TokenizerOf) -> tuple[dict[str, int], list[Mapping[str, Any]]]:
    where = model.files["tokenizer.json"]
    inner = tokenizer.get("model")
    vocab = inner.get("vocab") if isinstance(inner, dict) else None
    try:
        plain = (
            {str(text): int(number) for text, number in vocab.items()}
            if isinstance(vocab, dict)
            else {str(entry[0]): number for number, entry in enumerate(vocab or ())}
        )
        listed = tokenizer.get("added_tokens") or ()
        entries: list[Mapping[str, Any]] = [{**entry, "content": str(entry["content"])} for entry in listed]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise SourceError(f"{where}: its vocabulary cannot be read: {error!r}") from None
    if min(plain.values(), default=0) < 0:
        raise SourceError(f"{where} has tokens with negative ids", hint="save the tokenizer again")
    if not plain and not entries:
        raise SourceError(f"{where} holds no tokens", hint="save the tokenizer again")
    return plain, entries


def _of_vocab_json(model: TokenizerOf) -> tuple[dict[str, int], list[Mapping[str, Any]]]:
    """GPT-2's and Qwen's older form: vocab.json, merges.txt and added_tokens.json."""
    vocab = read_object(model.files, "vocab.json")
    if vocab is None:
        found = [
            name for name in ("tokenizer.model", "spiece.model", "vocab.txt", "tekken.json") if name in model.files
        ]
        beside = f", only {listing(found)}" if found else ""
        raise SourceError(f"{model.label} has no tokenizer.json{beside}", hint=save_again(model))
    extra = read_object(model.files, "added_tokens.json") or {}
    if bad := [text for text, number in {**vocab, **extra}.items() if not isinstance(number, int) or number < 0]:
        raise SourceError(f"{model.files['vocab.json']}: tokens without an id: {listing(map(repr, bad))}")
    return vocab, [{"content": text} for text in sorted(extra, key=lambda text: extra[text])]


def _added(
    entries: Iterable[Mapping[str, Any]], config: Mapping[str, Any], named: Iterable[str]
) -> dict[str, Mapping[str, bool]]:
    """Flags of every added token, in the order in which they are added."""
    found = {entry["content"]: _flags(entry) for entry in entries}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]) if str(item[0]).isdigit() else 0):
            if text := _text(entry):
                found[text] = _flags(entry)
    for text in named:
        found[text] = {**found.get(text, {**FLAGS, "normalized": False}), "special": True}
    return found


def _flags(entry: Mapping[str, Any]) -> Flags:
    special = bool(entry.get("special", False))
    defaults = {**FLAGS, "normalized": not special}
    return {name: bool(entry.get(name, default)) for name, default in defaults.items()}


def _roles(config: Mapping[str, Any]) -> list[str]:
    """The usual roles, then those that only this family has (`image_token`)."""
    own = [key.removesuffix("_token") for key in config if key.endswith("_token")]
    return list(dict.fromkeys([*ROLES, *own]))


def _listed(config: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role."""
    entries: list[Any] = []
    for name in _LISTS:
        value = config.get(name)
        entries += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for entry in entries if (text := _text(entry))]


def _text(entry: Any) -> str:
    """A token as tokenizer_config.json gives it: a string, or an object with `content`; else ""."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def _check_rows(vocabulary: Vocabulary) -> None:
    """An embedding may lack the rows of added tokens, but not of the tokens that texts are made of."""
    model = vocabulary.model
    outside = sorted((number, text) for text, number in vocabulary.plain.items() if number >= model.rows)
    outside = [(number, text) for number, text in outside if text not in vocabulary.added or number >= MOST_TOKENS]
    if outside or not model.rows:
        shown = listing(f"{text!r} ({number})" for number, text in outside)
        raise SourceError(
            f"{model.label}: its tokenizer has more tokens than its embedding has rows ({model.rows}): {shown}",
            hint="put the tokenizer there that belongs to these weights",
        )
