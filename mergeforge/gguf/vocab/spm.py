"""sentencepiece vocabularies: from tokenizer.model, or rebuilt from a tokenizer.json made of one.

Without tokenizer.model llama.cpp's converter gives every token the score -1000, and since its engine
merges by score, the file then tokenises wrongly. The merges in tokenizer.json hold the order, so a
token's score here is minus the rank of the first merge that makes it: the same ids come out again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from mergeforge.gguf.vocab.sentencepiece import UNIGRAM, PieceModel
from mergeforge.gguf.vocab.tokens import (
    ADDED_SCORE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Tokens,
    check_rows,
    looks_special,
)
from mergeforge.tokenizer.hf_files import AddedToken


def piece_tokens(
    model: PieceModel, added_json: Mapping[str, Any], tokenizer_config: Mapping[str, Any], rows: int
) -> Tokens:
    """The tokens of tokenizer.model, of added_tokens.json and of tokenizer_config.json's added_tokens_decoder."""
    names = {number: piece.text for number, piece in enumerate(model.pieces)}
    check_rows(names, rows, names, "tokenizer.model")
    tokens = Tokens.padding(rows)
    for number, piece in enumerate(model.pieces):
        tokens.put(number, piece.text, piece.kind, piece.score)
    for text, number in added_json.items():
        _put_added(tokens, int(number), text, USER_DEFINED, "added_tokens.json")
    for number, entry in (tokenizer_config.get("added_tokens_decoder") or {}).items():
        text, kind = spelled(entry["content"], bool(entry.get("special")))
        _put_added(tokens, int(number), text, kind, "tokenizer_config.json")
    if model.algorithm == UNIGRAM:
        tokens.notes.append(
            "tokenizer.model is a unigram model; llama.cpp merges its pieces by score, which can differ"
        )
    return tokens


def spelled(text: str, special: bool) -> tuple[str, int]:
    """An added token as llama.cpp looks for it in a text, and its type."""
    if special or looks_special(text):
        return text, CONTROL
    return text.replace(SPACE, " "), USER_DEFINED


def _put_added(tokens: Tokens, number: int, text: str, kind: int, file: str) -> None:
    if number < len(tokens):
        tokens.put(number, text, kind, ADDED_SCORE)
    else:
        tokens.notes.append(f"{file} adds {text!r} as {number}, for which the embedding has no row: left out")


def is_rebuildable(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json was made of a sentencepiece BPE model: BPE that falls back to bytes."""
    model = tokenizer.get("model") or {}
    return bool(model.get("type", "BPE") == "BPE" and model.get("byte_fallback") and model.get("merges"))


def rebuilt_tokens(tokenizer: Mapping[str, Any], added: Mapping[int, AddedToken], rows: int) -> Tokens:
    """The tokens that tokenizer.model would give, from a tokenizer.json made of it."""
    model = tokenizer["model"]
    names = {number: text for text, number in model["vocab"].items()}
    stored = {number: one.text for number, one in added.items() if one.stored}
    check_rows([*names, *stored], rows, {**names, **stored}, "tokenizer.json")
    tokens, scores = Tokens.padding(rows), _scores(tokenizer)
    never = -float(len(scores)) - 1  # a text of several letters that no merge makes: after all others
    for number, text in names.items():
        kind = _kind(text, model.get("unk_token"))
        single = len(text) == 1 or kind != NORMAL
        tokens.put(number, text, kind, scores.get(text, 0.0 if single else never))
    for number, one in added.items():
        _put_added(tokens, number, *spelled(one.text, one.special), "tokenizer_config.json")
    whole = {one.text for one in added.values()}  # matched as they are, never merged
    letters = {text for text in model["vocab"] if _kind(text, None) == NORMAL}
    tokens.notes.append(_rebuilt_note(letters - whole, tokenizer))
    return tokens


def _scores(tokenizer: Mapping[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for rank, merge in enumerate(_pairs(tokenizer)):
        scores.setdefault("".join(merge), 0.0 - rank)
    return scores


def _pairs(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = tokenizer["model"]["merges"]
    split = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]


def _kind(text: str, unknown: str | None) -> int:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        return BYTE
    return UNKNOWN if text == unknown else NORMAL


def _rebuilt_note(vocab: Set[str], tokenizer: Mapping[str, Any]) -> str:
    note = "no tokenizer.model: the scores are the merges' ranks (llama.cpp's converter writes -1000 for all)"
    pairs = set(_pairs(tokenizer))
    missing = sum(
        text[:at] in vocab and text[at:] in vocab and (text[:at], text[at:]) not in pairs
        for text in vocab
        for at in range(1, len(text))
    )
    if missing:
        note += f"; {missing} pairs of tokens merge by score that tokenizer.json has no merge for, so ids can differ"
    return note


def adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json puts a space before a text."""
    found = [
        *_flat(tokenizer.get("normalizer"), "normalizers"),
        *_flat(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]
    for one in found:
        if one.get("type") == "Prepend" and one.get("prepend") == SPACE:
            return True
        if one.get("type") == "Metaspace":
            scheme = one.get("prepend_scheme", "always" if one.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
    return False


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return (
        [two for one in part.get(inner) or () for two in _flat(one, inner)]
        if part.get("type") == "Sequence"
        else [part]
    )


def phi3_tokens(tokens: Tokens, tokenizer_config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    """Phi-3's added tokens: special ones by their flag alone, tokenizer.json's last."""
    listed = [(int(number), entry) for number, entry in (tokenizer_config.get("added_tokens_decoder") or {}).items()]
    stored = [(int(entry["id"]), entry) for entry in tokenizer.get("added_tokens") or ()]
    for number, entry in listed + stored:
        kind = CONTROL if entry.get("special") else USER_DEFINED
        _put_added(tokens, number, entry["content"], kind, "tokenizer.json")


# Gemma 4's chat format must stay visible to what parses the output.
_SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}


def gemma4_tokens(tokenizer: Mapping[str, Any], added: Mapping[int, AddedToken], named: Set[str], rows: int) -> Tokens:
    """Gemma 4's tokens. The engine merges them by the merges, so the scores mean nothing."""
    names = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    stored = {number: one.text for number, one in added.items() if one.stored}
    check_rows([*names, *stored], rows, {**names, **stored}, "tokenizer.json")
    tokens = Tokens.padding(rows)
    for number, text in {**names, **{n: one.text for n, one in added.items() if n < rows}}.items():
        base = number in names
        kind = CONTROL if text in named else _kind(text, None) if base else USER_DEFINED
        tokens.put(number, text, USER_DEFINED if text in _SHOWN else kind, ADDED_SCORE)
    return tokens
