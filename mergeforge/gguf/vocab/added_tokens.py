"""Added tokens: those of tokenizer.json, as tokenizer_config.json and its named tokens change them.

The tokenizer that a model is used with is tokenizer.json and tokenizer_config.json together: the
latter's `added_tokens_decoder` wins over the former's flags, and a token that it names (`pad_token`,
`additional_special_tokens`) is special, and is added with the next free id if there is none such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.gguf.vocab.hf_files import content_of

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Added:
    """An added token: matched as a whole, before the normalizer unless `normalized`.

    `stored`: it is in tokenizer.json's own list.
    """

    number: int
    text: str
    special: bool
    normalized: bool
    stored: bool = False


def added_tokens(
    tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> dict[int, Added]:
    """All added tokens by id. `special_map`: special_tokens_map.json, read where the config has no list of its own."""
    base: Mapping[str, int] = _base(tokenizer)
    found: dict[str, Added] = {}
    listed = tokenizer_config.get("added_tokens_decoder")
    entries = [(entry, True) for entry in tokenizer.get("added_tokens") or ()]
    entries += [(entry, False) for _, entry in sorted((listed or {}).items(), key=lambda item: int(item[0]))]
    for entry, stored in entries:
        old = found.get(entry["content"])
        number = old.number if old else _next(found, base, entry["content"])
        found[entry["content"]] = _added(entry, number, stored or (old is not None and old.stored))
    names = tokenizer_config if listed is not None else {**tokenizer_config, **special_map}
    for text in [*_roles(names), *_lists(names)]:
        found.setdefault(text, Added(_next(found, base, text), text, special=True, normalized=False))
    given = {entry["content"] for entry, stored in entries if stored == (listed is None)}
    for text in given.intersection(_roles(names)):
        found[text] = replace(found[text], special=True)
    return {one.number: one for one in found.values()}


def named_tokens(tokenizer_config: Mapping[str, Any], special_map: Mapping[str, Any]) -> set[str]:
    """The texts that tokenizer_config.json (or, without a list of its own, special_tokens_map.json) names."""
    listed = tokenizer_config.get("added_tokens_decoder") is not None
    names = tokenizer_config if listed else {**tokenizer_config, **special_map}
    return {*_roles(names), *_lists(names)}


def _base(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    return vocab if isinstance(vocab, Mapping) else {entry[0]: i for i, entry in enumerate(vocab)}


def _added(entry: Mapping[str, Any], number: int, stored: bool) -> Added:
    special = bool(entry.get("special", False))
    return Added(number, entry["content"], special, bool(entry.get("normalized", not special)), stored)


def _next(found: Mapping[str, Added], base: Mapping[str, int], text: str) -> int:
    """The id of a token that is added: its own in the vocabulary, else the next free one.

    So does the tokenizers library, whatever id tokenizer.json gives.
    """
    if text in base:
        return base[text]
    return max(max((one.number for one in found.values()), default=-1) + 1, len(base))


def _roles(config: Mapping[str, Any]) -> list[str]:
    """The tokens that have a role, such as `eos_token`; a family may have roles of its own."""
    entries = [config.get(f"{kind}_token") for kind in _NAMED]
    other = [v for k, v in config.items() if k.endswith("_token") and k.removesuffix("_token") not in _NAMED]
    return [text for entry in entries + other if (text := content_of(entry))]


def _lists(config: Mapping[str, Any]) -> list[str]:
    """Other special tokens."""
    found: Any = next((config[name] for name in reversed(_LISTS) if config.get(name)), [])
    entries = found.values() if isinstance(found, dict) else found
    return [text for entry in entries if (text := content_of(entry))]
