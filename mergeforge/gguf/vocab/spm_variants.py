"""Families whose sentencepiece file the converter reads in a way of its own: Arctic and T5."""

from __future__ import annotations

from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Keys, array, boolean, string
from mergeforge.gguf.vocab.kinds import KeysAndNotes, special_keys, special_tokens, spm, vocab_notes
from mergeforge.gguf.vocab.sentencepiece import BPE, SentencePieceModel, read_sentencepiece
from mergeforge.gguf.vocab.special_tokens import find_special_tokens
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.gguf.vocab.tokens import (
    ADDED_SCORE,
    CONTROL,
    PADDING_SCORE,
    UNKNOWN,
    USER_DEFINED,
    GGUFTokens,
    check_rows,
)
from mergeforge.gguf.vocab.wordpiece import unigram_keys, unigram_tokens


def arctic(files: TokenizerFiles) -> KeysAndNotes:
    """sentencepiece; tokenizer_config.json gives some of its pieces another meaning."""
    model = files.sentencepiece
    if model is None:
        raise SourceError(
            "this model family needs tokenizer.model, which the model's folder does not have",
            hint="copy tokenizer.model from the base model",
        )
    tokens = _pieces(model, files, "tokenizer.model")
    for token_id, entry in (files.tokenizer_config.get("added_tokens_decoder") or {}).items():
        if int(token_id) < files.rows:
            special = bool(entry.get("special"))
            is_unknown = special and entry["content"] == files.tokenizer_config.get("unk_token")
            token_type = UNKNOWN if is_unknown else CONTROL if special else USER_DEFINED
            tokens.put(int(token_id), entry["content"], token_type, 0.0 if special else PADDING_SCORE)
    special_ids = special_tokens(files, limit=files.rows)
    keys = {"tokenizer.ggml.model": string("llama"), "tokenizer.ggml.pre": string("default")}
    return {**keys, **tokens.keys(scores=True), **special_keys(files, special_ids)}, vocab_notes(tokens, special_ids)


def t5(files: TokenizerFiles) -> KeysAndNotes:
    """A unigram model from tokenizer.model, spiece.model or tokenizer.json; Pile-T5's is a BPE."""
    name = next((name for name in ("tokenizer.model", "spiece.model") if name in files.paths), "")
    model = read_sentencepiece(files.paths[name]) if name else None
    if model is not None and model.algorithm == BPE:
        return spm(files)
    if model is None:
        tokens, normalization = unigram_tokens(files), unigram_keys(files.tokenizer, files.tokenizer_config)
    else:
        tokens, normalization = _t5_tokens(model, files, name), _normalization(model)
    tokenizer = files.tokenizer if model is None else files.tokenizer_json
    special = find_special_tokens(tokenizer, files.tokenizer_config, files.config, limit=files.rows)
    keys = {"tokenizer.ggml.model": string("t5"), "tokenizer.ggml.pre": string("default"), **tokens.keys(scores=True)}
    return {**keys, **normalization, **special_keys(files, special)}, vocab_notes(tokens, special)


def _t5_tokens(model: SentencePieceModel, files: TokenizerFiles, name: str) -> GGUFTokens:
    tokens = _pieces(model, files, name)
    for text, token_id in files.added_json.items():
        if int(token_id) < files.rows:
            tokens.put(int(token_id), text, USER_DEFINED, ADDED_SCORE)
    return tokens


def _pieces(model: SentencePieceModel, files: TokenizerFiles, name: str) -> GGUFTokens:
    check_rows({at: piece.text for at, piece in enumerate(model.pieces)}, files.rows, str(files.paths[name]))
    tokens = GGUFTokens.padding(files.rows)
    for token_id, piece in enumerate(model.pieces):
        tokens.put(token_id, piece.text, piece.token_type, piece.score)
    return tokens


def _normalization(model: SentencePieceModel) -> Keys:
    keys = {
        "tokenizer.ggml.add_space_prefix": boolean(model.add_dummy_prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(model.remove_extra_whitespaces),
    }
    charsmap = {"tokenizer.ggml.precompiled_charsmap": array("u8", model.charsmap)} if model.charsmap else {}
    return {**keys, **charsmap}
