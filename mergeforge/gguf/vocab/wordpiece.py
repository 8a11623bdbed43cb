"""Vocabularies of encoder models: WordPiece (BERT), and unigram (XLM-RoBERTa), for which llama.cpp has a T5 engine."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.key_values import Keys, array, boolean
from mergeforge.gguf.vocab.bpe import bpe_tokens
from mergeforge.gguf.vocab.sentencepiece import read_sentencepiece
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.gguf.vocab.tokens import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, GGUFTokens, check_rows
from mergeforge.io.aux_files import AuxFile
from mergeforge.tokenizer.hf_files import token_text

# Pre-tokenizer by whether the vocabulary is cased. llama.cpp does the same under both names.
_PRE_TOKENIZERS = {False: "bert-bge", True: "bert-bge-large"}


def wordpiece_tokens(files: TokenizerFiles) -> GGUFTokens:
    """WordPiece in llama.cpp's form: the first piece of a word starts with a space, the others lose their `##`."""
    tokens = bpe_tokens(files)
    for token_id, (text, token_type) in enumerate(zip(tokens.texts, tokens.types, strict=True)):
        if token_type != CONTROL:
            tokens.texts[token_id] = text[2:] if text.startswith("##") else SPACE + text
    return tokens


def wordpiece_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """bert-bge; bert-bge-large for a vocabulary that splits Chinese characters and keeps its case."""
    return _PRE_TOKENIZERS[(tokenizer.get("normalizer") or {}).get("lowercase") is False]


def unigram_tokens(files: TokenizerFiles) -> GGUFTokens:
    """The tokens of a unigram tokenizer.json, scored by their log probabilities.

    Raises SourceError if the embedding has too few rows.
    """
    model = files.tokenizer["model"]
    texts = {token_id: entry[0] for token_id, entry in enumerate(model["vocab"])}
    check_rows(texts, files.rows, files.tokenizer_name)
    ids = {token.text: token_id for token_id, token in files.added.items()}
    unk_id = ids.get(token_text(files.tokenizer_config.get("unk_token")), model.get("unk_id", 3))
    tokens = GGUFTokens.padding(files.rows)
    for token_id, (text, score) in enumerate(model["vocab"]):
        token_type = CONTROL if text in files.named_texts else USER_DEFINED if token_id in files.added else NORMAL
        tokens.put(token_id, text, UNKNOWN if token_id == unk_id else token_type, score)
    return tokens


def unigram_keys(tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> Keys:
    """How a text is normalized before a unigram model sees it."""
    keys = {"tokenizer.ggml.add_space_prefix": boolean(bool(tokenizer_config.get("add_prefix_space", True)))}
    clean_up = bool(tokenizer_config.get("clean_up_tokenization_spaces", False))
    return {
        **keys,
        "tokenizer.ggml.remove_extra_whitespaces": boolean(clean_up),
        **_charsmap_keys(_charsmap(tokenizer)),
    }


def _charsmap_keys(charsmap: bytes) -> Keys:
    return {"tokenizer.ggml.precompiled_charsmap": array("u8", charsmap)} if charsmap else {}


def _charsmap(tokenizer: Mapping[str, Any]) -> bytes:
    """The normalizer's compiled character map; empty if there is none."""
    normalizer = tokenizer.get("normalizer") or {}
    for step in normalizer.get("normalizers") or [normalizer]:
        if "precompiled_charsmap" in step:
            try:
                return base64.b64decode(step["precompiled_charsmap"] or "")
            except ValueError as error:
                raise SourceError(
                    f"the precompiled_charsmap in tokenizer.json is not valid base64: {error}",
                    hint="copy tokenizer.json from the base model again",
                ) from error
    return b""


def xlm_roberta_tokens(path: AuxFile, rows: int) -> tuple[GGUFTokens, Keys]:
    """The tokens and keys of sentencepiece.bpe.model.

    XLM-RoBERTa's own special tokens come first and shift the ids of the file. Raises SourceError.
    """
    model = read_sentencepiece(path)
    special = (("<s>", CONTROL), ("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN))
    pieces = model.pieces[3:]
    texts = dict(enumerate([text for text, _ in special] + [piece.text for piece in pieces]))
    check_rows(texts, rows, str(path))
    tokens = GGUFTokens.padding(rows)
    tokens.texts = [f"[PAD{token_id - 1}]" for token_id in range(rows)]  # shifted, as in llama.cpp's converter
    for token_id, (text, token_type) in enumerate(special):
        tokens.put(token_id, text, token_type)
    for token_id, piece in enumerate(pieces, start=len(special)):
        tokens.put(token_id, piece.text, piece.token_type, piece.score)
    keys = {"tokenizer.ggml.add_space_prefix": boolean(model.add_dummy_prefix)}
    keys["tokenizer.ggml.remove_extra_whitespaces"] = boolean(model.remove_extra_whitespaces)
    return tokens, {**keys, **_charsmap_keys(model.charsmap)}
