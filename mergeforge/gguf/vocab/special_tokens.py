"""Special tokens: which id is BOS, EOS and so on, and which of them the tokenizer adds to a text.

llama.cpp's converter takes an id from the names in tokenizer_config.json first and from config.json second.
tokenizer.json's post-processor says which tokens are added; where it has a token that tokenizer_config.json does not
name, the name comes from there. This module follows the converter exactly (b11549), except that it skips what the
converter would crash on, and that it writes an EOS whenever it finds one: without EOS generation never ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergeforge.gguf.key_values import Keys, Value, boolean, u32
from mergeforge.tokenizer.hf_files import ROLES, token_text

_ID_KEYS = {  # GGUF has no key for cls
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelled so in the GGUF specification
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_ADDABLE = ("bos", "eos", "sep")


@dataclass
class SpecialTokens:
    """Special tokens by role (`eos`): their ids, and whether the tokenizer adds them to a text."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    normalizer: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keys(self) -> Keys:
        """The ids, then what is added, each in the order in which it was found."""
        ids = {
            f"tokenizer.ggml.{_ID_KEYS[role]}": u32(token_id) for role, token_id in self.ids.items() if role in _ID_KEYS
        }
        adds = {f"tokenizer.ggml.add_{role}_token": boolean(on) for role, on in self.adds.items() if role in _ADDABLE}
        return {**ids, **adds}

    def set_id(self, role: str, token_id: Any, limit: int | None, file: str) -> None:
        """Set the id of a role that has none yet. An id outside the vocabulary becomes a note."""
        if not isinstance(token_id, int) or isinstance(token_id, bool) or role in self.ids:
            return
        if token_id < 0 or (limit is not None and token_id >= limit):
            self.notes.append(f"{file} sets {role}_token_id to {token_id}, which is not in the vocabulary: left out")
            return
        self.ids[role] = token_id


@dataclass
class _TokenRoles:
    """Which token has which role, according to tokenizer_config.json and the post-processor."""

    config: dict[str, Any]  # tokenizer_config.json; the post-processor adds to it
    roles: list[str]
    adds: dict[str, bool] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)

    def assign(self, role: str, token: Any) -> None:
        self.tokens[role] = token
        if self.config:
            self.config[f"{role}_token"] = token


def find_special_tokens(
    tokenizer: Mapping[str, Any] | None,
    tokenizer_config: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    *,
    limit: int | None = None,
) -> SpecialTokens:
    """The special tokens of a model from tokenizer.json, tokenizer_config.json and config.json.

    `limit`: the number of tokens; ids from there on are left out.
    """
    roles = _TokenRoles(dict(tokenizer_config or {}), list(ROLES))
    special = SpecialTokens()
    if tokenizer is not None:
        special.normalizer = _normalizer_keys(tokenizer.get("normalizer"))
        _read_post_processor(roles, tokenizer.get("post_processor"))
    special.adds = roles.adds
    if roles.config:
        _read_tokenizer_config(special, roles, (tokenizer or {}).get("added_tokens") or (), limit)
    text_config = config.get("text_config") or {}
    for role in roles.roles:
        token_id = config.get(f"{role}_token_id")
        if token_id is None:
            token_id = text_config.get(f"{role}_token_id")
        special.set_id(role, token_id, limit, "config.json")
    _fill_gaps(special, roles, tokenizer or {}, config, limit)
    return special


def _read_tokenizer_config(
    special: SpecialTokens, roles: _TokenRoles, added: Sequence[Mapping[str, Any]], limit: int | None
) -> None:
    ids: dict[str, Any] = {}
    for token in added:
        ids.setdefault(token.get("content", ""), token.get("id"))
    for role in roles.roles:
        on = roles.config.get(f"add_{role}_token")
        if isinstance(on, bool):
            special.adds.setdefault(role, on)
        if text := token_text(roles.config.get(f"{role}_token")):
            special.set_id(role, ids.get(text), limit, "tokenizer_config.json")


def _normalizer_keys(normalizer: Mapping[str, Any] | None) -> dict[str, Value]:
    """How engines of BERT-like models must change a text first."""
    kind = (normalizer or {}).get("type")
    keys: dict[str, Value] = {}
    if normalizer is None or kind is None:
        return keys
    if kind == "Sequence":
        for step in normalizer.get("normalizers", ()):
            keys.update(_normalizer_keys(step))
    for name, type_name in (("lowercase", "Lowercase"), ("strip_accents", "StripAccents")):
        on = normalizer.get(name) if kind == "BertNormalizer" else True if kind == type_name else None
        if on is not None:
            keys[f"tokenizer.ggml.normalizer.{name}"] = boolean(on)
    return keys


def _read_post_processor(roles: _TokenRoles, post_processor: Mapping[str, Any] | None) -> None:
    roles.tokens = {role: roles.config.get(f"{role}_token") for role in ("bos", "cls", "eos", "sep")}
    for role, fallback in (("bos", "cls"), ("eos", "sep")):
        if not roles.tokens[role] and roles.tokens[fallback]:
            roles.assign(role, roles.tokens[fallback])
    for processor in (post_processor or {}).get("processors", [post_processor]) if post_processor else ():
        if processor.get("type") == "ByteLevel":
            roles.adds.setdefault("bos", False)
            roles.adds.setdefault("eos", False)
        elif processor.get("type") == "RobertaProcessing":
            _read_roberta(roles, processor)
        elif processor.get("type") == "TemplateProcessing":
            _read_template(roles, processor.get("single") or [], processor.get("pair") or [])


def _read_roberta(roles: _TokenRoles, processor: Mapping[str, Any]) -> None:
    roles.adds.update(bos=True, eos=True, sep=True)
    for role, fallback in (("cls", "bos"), ("sep", "eos")):
        if roles.config and not roles.tokens[role]:
            roles.assign(role, processor.get(role, [roles.tokens[fallback]])[0])


def _read_template(roles: _TokenRoles, single: Sequence[Any], pair: Sequence[Any]) -> None:
    first = _special_token(single[0]) if len(single) > 1 else None
    last = _special_token(single[-1]) if len(single) > 1 else None
    if first:
        _read_first(roles, first)
    if last:
        _read_last(roles, last)
    if pair:
        start = 1 if first and _special_token(pair[0]) == first else 0
        stop = len(pair) - 1 if last and _special_token(pair[-1]) == last else len(pair)
        _read_separators(roles, pair[start:stop], bool(last))


def _read_first(roles: _TokenRoles, token: str) -> None:
    """The template's first token is the BOS."""
    if not roles.config:
        roles.tokens["bos"] = token
    elif token not in (roles.tokens["bos"], roles.tokens["cls"]):
        for role in ("bos", "cls"):
            if not roles.tokens[role]:
                roles.assign(role, token)
    roles.adds["bos"] = token in (roles.tokens["bos"], roles.tokens["cls"])


def _read_last(roles: _TokenRoles, token: str) -> None:
    """The template's last token is the EOS; the token that had this role so far becomes EOT or EOM."""
    if roles.config and token != roles.tokens["eos"]:
        spare = next((role for role in ("eot", "eom") if role not in roles.roles), None)
        if spare:
            roles.roles.append(spare)
            roles.config[f"{spare}_token"] = roles.tokens["eos"]
    roles.assign("eos", token)
    roles.adds["eos"] = True


def _read_separators(roles: _TokenRoles, parts: Sequence[Any], has_last: bool) -> None:
    """Whether a separator is added between two texts: `parts` is A [sep] [eos] B."""
    inner = parts[1:-1]
    if not inner or _sequence(parts[0]) != "A" or _sequence(parts[-1]) != "B":
        return
    separators = [token for token in (roles.tokens["sep"], roles.tokens["eos"]) if token]
    on = not has_last and _special_token(inner[0]) in separators
    on = on or (len(inner) == 2 and _special_token(inner[1]) in separators)
    roles.adds["sep"] = on
    if on and roles.config and not roles.tokens["sep"]:
        roles.config["sep_token"] = roles.tokens["eos"]


def _special_token(part: Mapping[str, Any]) -> str | None:
    token: str | None = part.get("SpecialToken", {}).get("id")
    return token


def _sequence(part: Mapping[str, Any]) -> str | None:
    name: str | None = part.get("Sequence", {}).get("id")
    return name


def _fill_gaps(
    special: SpecialTokens,
    roles: _TokenRoles,
    tokenizer: Mapping[str, Any],
    config: Mapping[str, Any],
    limit: int | None,
) -> None:
    """Set an EOS that config.json has in a list or only the vocabulary knows, and a BOS that is added."""
    eos_ids = config.get("eos_token_id") or (config.get("text_config") or {}).get("eos_token_id")
    if "eos" not in special.ids and isinstance(eos_ids, list) and eos_ids:
        special.notes.append(f"config.json lists the EOS tokens {eos_ids}: the GGUF file gets the first one")
        special.set_id("eos", eos_ids[0], limit, "config.json")
    vocab = tokenizer.get("model", {}).get("vocab")
    ids = {token.get("content"): token.get("id") for token in tokenizer.get("added_tokens") or ()}
    for role in ("bos", "eos"):
        text = token_text(roles.tokens.get(role))
        is_needed = role == "eos" or special.adds.get("bos")
        if role in special.ids or not text or not is_needed:
            continue
        token_id = ids.get(text, vocab.get(text) if isinstance(vocab, dict) else None)
        special.set_id(role, token_id, limit, "tokenizer.json")
