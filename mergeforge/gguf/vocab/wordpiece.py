"""BERT's vocabularies: WordPiece, and the unigram ones of XLM-RoBERTa and T5."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Set
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Keys, array, boolean
from mergeforge.gguf.vocab.bpe import bpe_tokens
from mergeforge.gguf.vocab.sentencepiece import piece_model
from mergeforge.gguf.vocab.tokens import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Tokens, check_rows
from mergeforge.io.aux_files import AuxFile
from mergeforge.tokenizer.hf_files import AddedToken

_PRE = {False: "bert-bge", True: "bert-bge-large"}  # the engine does the same under both


def wordpiece_tokens(tokenizer: Mapping[str, Any], added: Mapping[int, AddedToken], rows: int) -> Tokens:
    """WordPiece as llama.cpp wants it: a word's first piece starts with a space, the others lose their `##`."""
    tokens = bpe_tokens(tokenizer, added, rows)
    for number, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True)):
        if kind != CONTROL:
            tokens.texts[number] = text[2:] if text.startswith("##") else SPACE + text
    return tokens


def wordpiece_pre(tokenizer: Mapping[str, Any]) -> str:
    """bert-bge, or bert-bge-large for a vocabulary that splits Chinese characters and keeps its case."""
    return _PRE[(tokenizer.get("normalizer") or {}).get("lowercase") is False]


def unigram_tokens(
    tokenizer: Mapping[str, Any], added: Mapping[int, AddedToken], named: Set[str], unk_token: str | None, rows: int
) -> Tokens:
    """A unigram vocabulary: pieces with their log probabilities."""
    model = tokenizer["model"]
    pieces = model["vocab"]
    names = {number: piece[0] for number, piece in enumerate(pieces)}
    check_rows(names, rows, names, "tokenizer.json")
    numbers = {one.text: number for number, one in added.items()}
    unknown = numbers.get(unk_token or "", model.get("unk_id", 3))
    tokens = Tokens.padding(rows)
    for number, (text, score) in enumerate(pieces):
        kind = CONTROL if text in named else USER_DEFINED if number in added else NORMAL
        tokens.put(number, text, UNKNOWN if number == unknown else kind, score)
    return tokens


def unigram_keys(tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> Keys:
    """How the text is normalised before a unigram model sees it."""
    keys = {"tokenizer.ggml.add_space_prefix": boolean(bool(tokenizer_config.get("add_prefix_space", True)))}
    clean = bool(tokenizer_config.get("clean_up_tokenization_spaces", False))
    return {**keys, "tokenizer.ggml.remove_extra_whitespaces": boolean(clean), **charsmap_keys(_charsmap(tokenizer))}


def charsmap_keys(charsmap: bytes) -> Keys:
    return {"tokenizer.ggml.precompiled_charsmap": array("u8", charsmap)} if charsmap else {}


def _charsmap(tokenizer: Mapping[str, Any]) -> bytes:
    normalizer = tokenizer.get("normalizer") or {}
    for one in normalizer.get("normalizers") or [normalizer]:
        if "precompiled_charsmap" in one:
            try:
                return base64.b64decode(one["precompiled_charsmap"] or "")
            except ValueError as error:
                raise SourceError(f"tokenizer.json's precompiled_charsmap is not base64: {error}") from error
    return b""


def xlm_roberta_tokens(path: AuxFile, rows: int) -> tuple[Tokens, Keys]:
    """sentencepiece.bpe.model, whose ids XLM-RoBERTa shifts: its own special tokens come first."""
    model = piece_model(path)
    first = (("<s>", CONTROL), ("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN))
    shifted = [(piece.text, piece.kind, piece.score) for piece in model.pieces[3:]]
    names = dict(enumerate([text for text, _ in first] + [piece.text for piece in model.pieces[3:]]))
    check_rows(names, rows, names, "sentencepiece.bpe.model")
    tokens = Tokens.padding(rows)
    tokens.texts = [f"[PAD{number - 1}]" for number in range(rows)]  # shifted, as llama.cpp's converter does
    for number, (text, kind) in enumerate(first):
        tokens.put(number, text, kind)
    for number, (text, kind, score) in enumerate(shifted, start=len(first)):
        tokens.put(number, text, kind, score)
    keys = {"tokenizer.ggml.add_space_prefix": boolean(model.add_dummy_prefix)}
    keys["tokenizer.ggml.remove_extra_whitespaces"] = boolean(model.remove_extra_whitespaces)
    return tokens, {**keys, **charsmap_keys(model.charsmap)}
