"""The tokenizer files of Hugging Face models, read as transformers 5 reads them (`PreTrainedTokenizerBase`).

The tokenizer that a model is used with is tokenizer.json changed by tokenizer_config.json: the latter's
`added_tokens_decoder` wins over the former's flags, and a token that it names (`pad_token`, `extra_special_tokens`)
is added if it is missing. special_tokens_map.json counts only where there is no `added_tokens_decoder`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.io.aux_files import AuxFiles

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # SPECIAL_TOKENS_ATTRIBUTES, in its order
_DECODER, _EXTRA, _ADDITIONAL = "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole, before the normalizer unless `normalized` (tokenizers' AddedToken).

    `stored`: it is in tokenizer.json's own list.
    """

    number: int
    text: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False
    stored: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        """How the token is matched, in the order of tokenizer.json."""
        return {name: getattr(self, name) for name in FLAGS}


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class NamedTokens:
    """The special tokens that the configuration names: role -> entry (`eos`), and entries without a role.

    An entry is a string, or an object with `content` and flags.
    """

    roles: Mapping[str, Any]
    unnamed: tuple[Any, ...]

    @property
    def role_texts(self) -> dict[str, str]:
        return {role: token_text(entry) for role, entry in self.roles.items()}

    @property
    def unnamed_texts(self) -> tuple[str, ...]:
        return tuple(map(token_text, self.unnamed))

    @property
    def texts(self) -> set[str]:
        return {*self.role_texts.values(), *self.unnamed_texts}


def read_text(files: AuxFiles, name: str) -> str | None:
    """The text of a file; None if there is no such file. Raises SourceError."""
    if name not in files:
        return None
    try:
        return files[name].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{files[name]} cannot be read: {error}", hint="copy it from the model again") from error


def read_object(files: AuxFiles, name: str) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file. Raises SourceError."""
    content = read_text(files, name)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        text = f"{files[name]} cannot be read as JSON: {error}"
        raise SourceError(text, hint="copy it from the model again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{files[name]} is not a JSON object", hint="copy it from the model again")
    return value


def token_text(entry: Any) -> str:
    """The text of a token in tokenizer_config.json: a string, or an object with `content`; "" for anything else."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def named_tokens(tokenizer_config: Mapping[str, Any], special_map: Mapping[str, Any]) -> NamedTokens:
    """The special tokens that the configuration names. `special_map`: special_tokens_map.json.

    `additional_special_tokens` is the old name of `extra_special_tokens`, and counts only where the latter is empty.
    """
    config = dict(tokenizer_config)
    if _ADDITIONAL in config and not config.get(_EXTRA):
        config[_EXTRA] = config.pop(_ADDITIONAL)
    named = {key: config.pop(key) for key in [*config] if _is_own_role(key) and isinstance(config[key], str)}
    named |= _pop_named_extra(config)
    if tokenizer_config.get(_DECODER) is None:
        for key, value in special_map.items():
            config[key] = _extended(config.get(_EXTRA), value) if key == _EXTRA and isinstance(value, list) else value
        named |= _pop_named_extra(config)
    if _ADDITIONAL in config and _EXTRA not in config:
        config[_EXTRA] = config[_ADDITIONAL]
    own = {key: value for key, value in config.items() if _is_own_role(key) and token_text(value)} | named
    roles = {role: config.get(f"{role}_token") for role in ROLES}
    roles |= {key.removesuffix("_token"): value for key, value in own.items()}
    extra = config.get(_EXTRA)
    return NamedTokens(
        {role: value for role, value in roles.items() if token_text(value)},
        tuple(entry for entry in extra if token_text(entry)) if isinstance(extra, list) else (),
    )


def _is_own_role(key: str) -> bool:
    """Whether a key names a token with a role that only some models have (`image_token`)."""
    return key.endswith("_token") and key.removesuffix("_token") not in ROLES


def _pop_named_extra(config: dict[str, Any]) -> dict[str, Any]:
    """`extra_special_tokens` given as a mapping: roles of their own."""
    return config.pop(_EXTRA) if isinstance(config.get(_EXTRA), dict) else {}


def _extended(entries: Any, further: list[Any]) -> list[Any]:
    merged = list(entries) if isinstance(entries, list) else []
    return merged + [entry for entry in further if entry not in merged]


def added_tokens(
    model_ids: Mapping[str, int],
    stored: Iterable[Mapping[str, Any]],
    tokenizer_config: Mapping[str, Any],
    special_map: Mapping[str, Any],
) -> dict[str, AddedToken]:
    """Every added token by its text, in the order in which transformers adds them.

    `model_ids`: the vocabulary without added tokens; `stored`: the `added_tokens` of tokenizer.json.
    """
    tokens: dict[str, AddedToken] = {}

    def add(entry: Mapping[str, Any], is_stored: bool) -> None:
        text = entry["content"]
        known = tokens.get(text)
        number = known.number if known else next_id(model_ids, (token.number for token in tokens.values()), text)
        tokens[text] = _added_token(entry, number, is_stored or (known is not None and known.stored))

    stored = list(stored)
    for entry in stored:
        add(entry, True)
    named, decoder = named_tokens(tokenizer_config, special_map), tokenizer_config.get(_DECODER)
    configured = stored if decoder is None else [entry for _, entry in sorted(decoder.items(), key=_decoder_id)]
    for entry in configured:
        add(entry, False)
    missing: list[Any] = []
    for entry in (*named.roles.values(), *named.unnamed):
        if token_text(entry) not in tokens and entry not in missing:
            missing.append(entry)
    for entry in missing:  # if entries of one text differ, the last one counts
        add(entry if isinstance(entry, dict) else {"content": entry, "special": True}, False)
    configured = [*configured, *missing]
    roles = {*named.role_texts.values()}
    for text in roles.intersection(map(token_text, configured)):
        tokens[text] = replace(tokens[text], special=True)
    return tokens


def _decoder_id(item: tuple[str, Any]) -> int:
    return int(item[0])


def _added_token(entry: Mapping[str, Any], number: int, stored: bool) -> AddedToken:
    special = bool(entry.get("special", False))
    defaults = {**FLAGS, "normalized": not special, "special": special}
    flags = {name: bool(entry.get(name, default)) for name, default in defaults.items()}
    return AddedToken(number, entry["content"], stored=stored, **flags)


def next_id(model_ids: Mapping[str, int], added_ids: Iterable[int], text: str) -> int:
    """The id of a token that is added: its own in the vocabulary, else the next free one.

    That is what the tokenizers library gives (added_vocabulary.rs, add_tokens), whatever id tokenizer.json has.
    """
    if text in model_ids:
        return model_ids[text]
    return max(max(added_ids, default=-1) + 1, len(model_ids))
