"""Special tokens: which id is BOS, EOS and so on, and which the tokenizer adds to a text.

llama.cpp's converter takes the ids from tokenizer_config.json's names first and from config.json
second, and lets tokenizer.json's post-processor say which tokens are added; where the post-processor
names a token that tokenizer_config.json does not, the name is taken from there. Followed here to the
letter (b11549), except that what it would crash on is skipped, and that an EOS is not left out when
one can be found: without it generation never ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergeforge.gguf.key_values import Keys, Value, boolean, u32
from mergeforge.tokenizer.hf_files import token_text

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ID_KEYS = {  # GGUF has none for cls
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_ADDED = ("bos", "eos", "sep")


@dataclass
class Special:
    """Special tokens by kind: their ids, and whether the tokenizer adds them."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    normalizer: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def id_keys(self) -> Keys:
        """The ids, then what is added, in the order in which they were found."""
        ids = {f"tokenizer.ggml.{_ID_KEYS[kind]}": u32(number) for kind, number in self.ids.items() if kind in _ID_KEYS}
        adds = {f"tokenizer.ggml.add_{kind}_token": boolean(on) for kind, on in self.adds.items() if kind in _ADDED}
        return {**ids, **adds}

    def take(self, kind: str, number: Any, limit: int | None, where: str) -> None:
        """Note an id, unless that kind has one already."""
        if not isinstance(number, int) or isinstance(number, bool) or kind in self.ids:
            return
        if number < 0 or (limit is not None and number >= limit):
            self.notes.append(f"{where} gives {kind}_token_id {number}, which is no token: left out")
            return
        self.ids[kind] = number


@dataclass
class _Names:
    """The post-processor's and tokenizer_config.json's view of which token has which role."""

    config: dict[str, Any]  # tokenizer_config.json; the post-processor adds to it
    kinds: list[str]
    adds: dict[str, bool] = field(default_factory=dict)
    roles: dict[str, Any] = field(default_factory=dict)

    def rename(self, kind: str, token: Any) -> None:
        self.roles[kind] = token
        if self.config:
            self.config[f"{kind}_token"] = token


def special_tokens(
    tokenizer: Mapping[str, Any] | None,
    tokenizer_config: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    *,
    limit: int | None = None,
) -> Special:
    """The special tokens of a model from tokenizer.json, tokenizer_config.json and config.json.

    `limit`: the number of tokens; an id from there on is left out.
    """
    names = _Names(dict(tokenizer_config or {}), list(KINDS))
    special = Special()
    if tokenizer is not None:
        special.normalizer = _normalizer_keys(tokenizer.get("normalizer"))
        _read_post_processor(names, tokenizer.get("post_processor"))
    special.adds = names.adds
    if names.config:
        _read_names(special, names, (tokenizer or {}).get("added_tokens") or (), limit)
    text_config = config.get("text_config") or {}
    for kind in names.kinds:
        number = config.get(f"{kind}_token_id")
        special.take(kind, number if number is not None else text_config.get(f"{kind}_token_id"), limit, "config.json")
    _fill_gaps(special, names, tokenizer or {}, config, limit)
    return special


def _read_names(special: Special, names: _Names, added: Sequence[Mapping[str, Any]], limit: int | None) -> None:
    ids: dict[str, Any] = {}
    for token in added:
        ids.setdefault(token.get("content", ""), token.get("id"))
    for kind in names.kinds:
        on = names.config.get(f"add_{kind}_token")
        if isinstance(on, bool):
            special.adds.setdefault(kind, on)
        if text := token_text(names.config.get(f"{kind}_token")):
            special.take(kind, ids.get(text), limit, "tokenizer_config.json")


def _normalizer_keys(normalizer: Mapping[str, Any] | None) -> dict[str, Value]:
    """What BERT-like engines must do to the text first."""
    kind = (normalizer or {}).get("type")
    keys: dict[str, Value] = {}
    if normalizer is None or kind is None:
        return keys
    if kind == "Sequence":
        for one in normalizer.get("normalizers", ()):
            keys.update(_normalizer_keys(one))
    for name, type_name in (("lowercase", "Lowercase"), ("strip_accents", "StripAccents")):
        on = normalizer.get(name) if kind == "BertNormalizer" else True if kind == type_name else None
        if on is not None:
            keys[f"tokenizer.ggml.normalizer.{name}"] = boolean(on)
    return keys


def _read_post_processor(names: _Names, post_processor: Mapping[str, Any] | None) -> None:
    names.roles = {kind: names.config.get(f"{kind}_token") for kind in ("bos", "cls", "eos", "sep")}
    for kind, other in (("bos", "cls"), ("eos", "sep")):
        if not names.roles[kind] and names.roles[other]:
            names.rename(kind, names.roles[other])
    for one in (post_processor or {}).get("processors", [post_processor]) if post_processor else ():
        if one.get("type") == "ByteLevel":
            names.adds.setdefault("bos", False)
            names.adds.setdefault("eos", False)
        elif one.get("type") == "RobertaProcessing":
            _read_roberta(names, one)
        elif one.get("type") == "TemplateProcessing":
            _read_template(names, one.get("single") or [], one.get("pair") or [])


def _read_roberta(names: _Names, processor: Mapping[str, Any]) -> None:
    names.adds.update(bos=True, eos=True, sep=True)
    for kind, other in (("cls", "bos"), ("sep", "eos")):
        if names.config and not names.roles[kind]:
            names.rename(kind, processor.get(kind, [names.roles[other]])[0])


def _read_template(names: _Names, single: Sequence[Any], pair: Sequence[Any]) -> None:
    first = _token(single[0]) if len(single) > 1 else None
    last = _token(single[-1]) if len(single) > 1 else None
    if first:
        _read_first(names, first)
    if last:
        _read_last(names, last)
    if pair:
        start = 1 if first and _token(pair[0]) == first else 0
        stop = len(pair) - 1 if last and _token(pair[-1]) == last else len(pair)
        _read_between(names, pair[start:stop], bool(last))


def _read_first(names: _Names, token: str) -> None:
    if not names.config:
        names.roles["bos"] = token
    elif token not in (names.roles["bos"], names.roles["cls"]):
        for kind in ("bos", "cls"):
            if not names.roles[kind]:
                names.rename(kind, token)
    names.adds["bos"] = token in (names.roles["bos"], names.roles["cls"])


def _read_last(names: _Names, token: str) -> None:
    """The template's last token is the EOS; the one that is called so then ends a turn or message."""
    if names.config and token != names.roles["eos"]:
        spare = next((kind for kind in ("eot", "eom") if kind not in names.kinds), None)
        if spare:
            names.kinds.append(spare)
            names.config[f"{spare}_token"] = names.roles["eos"]
    names.rename("eos", token)
    names.adds["eos"] = True


def _read_between(names: _Names, parts: Sequence[Any], has_last: bool) -> None:
    """A [sep] [eos] B: whether a separator is added between two texts."""
    inner = parts[1:-1]
    if not inner or _sequence(parts[0]) != "A" or _sequence(parts[-1]) != "B":
        return
    separators = [token for token in (names.roles["sep"], names.roles["eos"]) if token]
    on = not has_last and _token(inner[0]) in separators
    on = on or (len(inner) == 2 and _token(inner[1]) in separators)
    names.adds["sep"] = on
    if on and names.config and not names.roles["sep"]:
        names.config["sep_token"] = names.roles["eos"]


def _token(part: Mapping[str, Any]) -> str | None:
    found: str | None = part.get("SpecialToken", {}).get("id")
    return found


def _sequence(part: Mapping[str, Any]) -> str | None:
    found: str | None = part.get("Sequence", {}).get("id")
    return found


def _fill_gaps(
    special: Special, names: _Names, tokenizer: Mapping[str, Any], config: Mapping[str, Any], limit: int | None
) -> None:
    """An EOS that the config lists among several, or that only the vocabulary knows; a BOS that is added."""
    listed = config.get("eos_token_id") or (config.get("text_config") or {}).get("eos_token_id")
    if "eos" not in special.ids and isinstance(listed, list) and listed:
        special.notes.append(f"config.json lists the EOS tokens {listed}: the first is the file's EOS")
        special.take("eos", listed[0], limit, "config.json")
    vocab = tokenizer.get("model", {}).get("vocab")
    ids = {token.get("content"): token.get("id") for token in tokenizer.get("added_tokens") or ()}
    for kind in ("bos", "eos"):
        text = token_text(names.roles.get(kind))
        wanted = kind == "eos" or special.adds.get("bos")
        if kind in special.ids or not text or not wanted:
            continue
        number = ids.get(text, vocab.get(text) if isinstance(vocab, dict) else None)
        special.take(kind, number, limit, "tokenizer.json")
