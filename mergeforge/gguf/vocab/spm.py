"""sentencepiece vocabularies: from tokenizer.model, or rebuilt from a tokenizer.json that was made from one.

Without tokenizer.model llama.cpp's converter gives every token the score -1000. Its engine merges by score, so such a
file tokenizes wrongly. The merges in tokenizer.json keep the order, so here a token's score is minus the rank of the
first merge that produces it: the ids come out as with tokenizer.model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from mergeforge.gguf.vocab.sentencepiece import UNIGRAM, SentencePieceModel
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.gguf.vocab.tokens import (
    ADDED_SCORE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    GGUFTokens,
    added_token,
    check_rows,
)


def sentencepiece_tokens(model: SentencePieceModel, files: TokenizerFiles, *, phi3: bool = False) -> GGUFTokens:
    """The tokens of tokenizer.model, added_tokens.json and tokenizer_config.json's added_tokens_decoder.

    phi3: mark an added token as special by its flag alone, and let tokenizer.json's added tokens win.
    Raises SourceError if the embedding has too few rows.
    """
    texts = {token_id: piece.text for token_id, piece in enumerate(model.pieces)}
    check_rows(texts, files.rows, str(files.paths["tokenizer.model"]))
    tokens = GGUFTokens.padding(files.rows)
    for token_id, piece in enumerate(model.pieces):
        tokens.put(token_id, piece.text, piece.token_type, piece.score)
    for text, token_id in files.added_json.items():
        _put_added(tokens, int(token_id), text, USER_DEFINED, "added_tokens.json")
    entries = files.tokenizer_config.get("added_tokens_decoder") or {}
    if not phi3:
        for token_id, entry in entries.items():
            text, token_type = added_token(entry["content"], bool(entry.get("special")))
            _put_added(tokens, int(token_id), text, token_type, "tokenizer_config.json")
    if model.algorithm == UNIGRAM:
        tokens.notes.append(
            "tokenizer.model is a unigram model, but llama.cpp merges its pieces by score: token ids can differ"
        )
    if phi3:
        stored = (files.tokenizer_json or {}).get("added_tokens") or ()
        for token_id, entry in [*entries.items(), *((entry["id"], entry) for entry in stored)]:
            token_type = CONTROL if entry.get("special") else USER_DEFINED
            _put_added(tokens, int(token_id), entry["content"], token_type, "tokenizer.json")
    return tokens


def _put_added(tokens: GGUFTokens, token_id: int, text: str, token_type: int, file: str) -> None:
    if token_id < len(tokens):
        tokens.put(token_id, text, token_type, ADDED_SCORE)
    else:
        tokens.notes.append(f"{file} adds {text!r} with id {token_id}, which has no embedding row: left out")


def is_rebuildable(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json was made from a sentencepiece BPE model: BPE with byte fallback."""
    model = tokenizer.get("model") or {}
    return bool(model.get("type", "BPE") == "BPE" and model.get("byte_fallback") and model.get("merges"))


def rebuilt_tokens(files: TokenizerFiles) -> GGUFTokens:
    """The tokens that tokenizer.model would give, from the tokenizer.json that was made from it.

    Raises SourceError if the embedding has too few rows.
    """
    texts, unk_token = files.model_texts(), files.tokenizer["model"].get("unk_token")
    merges = _merges(files.tokenizer)
    tokens, scores = GGUFTokens.padding(files.rows), _scores(merges)
    unmergeable_score = -float(len(scores)) - 1  # for a text of several characters that no merge produces: the lowest
    for token_id, text in texts.items():
        token_type = _token_type(text, unk_token)
        needs_no_merge = len(text) == 1 or token_type != NORMAL
        tokens.put(token_id, text, token_type, scores.get(text, 0.0 if needs_no_merge else unmergeable_score))
    for token_id, token in files.added.items():
        _put_added(tokens, token_id, *added_token(token.text, token.special), "tokenizer_config.json")
    added_texts = {token.text for token in files.added.values()}  # matched whole, never merged
    mergeable = {text for text in texts.values() if _token_type(text, None) == NORMAL}
    tokens.notes.append(_rebuilt_note(mergeable - added_texts, set(merges)))
    return tokens


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = tokenizer["model"]["merges"]
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _scores(merges: list[tuple[str, str]]) -> dict[str, float]:
    """Minus the rank of the first merge that produces each text."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge), 0.0 - rank)
    return scores


def _token_type(text: str, unk_token: str | None) -> int:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        return BYTE
    return UNKNOWN if text == unk_token else NORMAL


def _rebuilt_note(texts: Set[str], merges: Set[tuple[str, str]]) -> str:
    note = "no tokenizer.model: the scores are the ranks of the merges (llama.cpp's converter writes -1000 for all)"
    unlisted = sum(
        text[:at] in texts and text[at:] in texts and (text[:at], text[at:]) not in merges
        for text in texts
        for at in range(1, len(text))
    )
    if unlisted:
        note += (
            f"; llama.cpp can merge {unlisted} pairs of tokens for which tokenizer.json has no merge: ids can differ"
        )
    return note


def adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json puts a space before a text."""
    steps = [
        *_flatten(tokenizer.get("normalizer"), "normalizers"),
        *_flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            return True
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
    return False


def _flatten(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """The steps of a nested Sequence in order; `children` is the key that holds a Sequence's steps."""
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for child in step.get(children) or () for inner in _flatten(child, children)]


# Special tokens of Gemma 4's chat format that must appear in the output, for the programs that parse it.
_VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}


def gemma4_tokens(files: TokenizerFiles) -> GGUFTokens:
    """Gemma 4's tokens. The engine follows the list of merges, so it does not use the scores.

    Raises SourceError if the embedding has too few rows.
    """
    texts = files.model_texts()
    added = {token_id: token.text for token_id, token in files.added.items() if token_id < files.rows}
    tokens = GGUFTokens.padding(files.rows)
    for token_id, text in {**texts, **added}.items():
        default = _token_type(text, None) if token_id in texts else USER_DEFINED
        token_type = CONTROL if text in files.named_texts else default
        tokens.put(token_id, text, USER_DEFINED if text in _VISIBLE else token_type, ADDED_SCORE)
    return tokens
