"""Tokenizer files from the keys of a GGUF file: the reverse of mergeforge.gguf.vocab, for all kinds of vocabulary.

tokenizer.json and tokenizer_config.json (with the chat templates) are written for every kind, tokenizer.model also for
sentencepiece vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.hf_tokenizer.bpe import bpe_tokenizer, raw_bpe_tokenizer
from mergeforge.gguf.hf_tokenizer.settings import tokenizer_config
from mergeforge.gguf.hf_tokenizer.spm import sentencepiece_file, spm_tokenizer
from mergeforge.gguf.hf_tokenizer.unigram import unigram_tokenizer
from mergeforge.gguf.hf_tokenizer.vocabulary import StoredVocabulary, read_vocabulary
from mergeforge.gguf.hf_tokenizer.wordpiece import wordpiece_tokenizer
from mergeforge.gguf.reader import GGUFHeader

# tokenizer.ggml.model -> what makes tokenizer.json, and notes
_KINDS: dict[str, Callable[[StoredVocabulary], tuple[dict[str, Any], list[str]]]] = {
    "gpt2": bpe_tokenizer,
    "gemma4": raw_bpe_tokenizer,
    "llama": spm_tokenizer,
    "bert": wordpiece_tokenizer,
    "t5": unigram_tokenizer,
}
_NO_VOCABULARY = ("none", "no_vocab")


def rebuild_tokenizer(header: GGUFHeader, path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer files by name, and notes. Raises SourceError for a damaged vocabulary or one of another kind."""
    kind = header.get("tokenizer.ggml.model")
    if kind in _NO_VOCABULARY:
        return {}, [f"{path.name} has no vocabulary: no tokenizer files are written"]
    if kind not in _KINDS:
        known = f"known are {format_list(list(_KINDS))}"
        text = (
            f"{path}: no tokenizer can be made from a vocabulary of the kind {kind}"
            if kind
            else f"{path} has no vocabulary"
        )
        raise SourceError(text, hint=f"{known}; use the folder of the model that the file was made from")
    vocabulary = read_vocabulary(header, path)
    tokenizer, notes = _KINDS[kind](vocabulary)
    files = {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(tokenizer_config(vocabulary))}
    if kind == "llama":
        files["tokenizer.model"] = sentencepiece_file(vocabulary)
    return files, [*vocabulary.notes, *notes]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
