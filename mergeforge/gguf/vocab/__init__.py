"""A model's vocabulary as GGUF key/values: all `tokenizer.*` keys, from the tokenizer files in the model's folder.

    vocabulary(paths, config, "llama", rows=32000).keys

`kind` names the vocabulary of a model family; llama.cpp's converter decides it by the family too:

* `llama`: tokenizer.model (sentencepiece, "SPM") if there is one, else SPM rebuilt from a tokenizer.json with byte
  fallback, else `gpt2`; with exceptions for CodeLlama and Granite. `spm_or_gpt2`: the same without the exceptions.
  `spm`: SPM or an error.
* `gpt2`: byte-level BPE from tokenizer.json (or vocab.json and merges.txt).
* `gemma` (Gemma and Gemma 2), `gemma3`: SPM without a space before a text. `gemma4`: BPE over raw UTF-8.
* `phi3`: `gpt2` if tokenizer_class is GPT2Tokenizer, else SPM. `internlm2`, `internlm3`: SPM.
* `stablelm`, `glm4`, `glm4_moe` (4.5 and later), `chatglm`: `gpt2`; the GLMs have special tokens of fixed names.
* `arctic`: SPM, where tokenizer_config.json redefines pieces. `t5`: a unigram model from spiece.model.
* `bert` (WordPiece), `roberta` (BPE), `unigram` (XLM-RoBERTa, which runs on T5's engine). `none`: no vocabulary.

The number of tokens always equals the number of rows of the token embedding, because llama.cpp refuses anything else:
missing tokens are padded, and too many are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.errors import RecipeError, did_you_mean, malformed_as_source_error
from mergeforge.gguf.key_values import Keys
from mergeforge.gguf.vocab.families import KINDS
from mergeforge.gguf.vocab.tokenizer_files import TokenizerFiles
from mergeforge.io.aux_files import AuxFiles

__all__ = ["KINDS", "Vocabulary", "vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """All `tokenizer.*` keys in the converter's order, notes for the user, and the number of tokens."""

    keys: Keys
    notes: tuple[str, ...]
    size: int


def vocabulary(
    paths: AuxFiles, config: Mapping[str, Any], kind: str, *, rows: int, pre: str | None = None
) -> Vocabulary:
    """The vocabulary of a model whose token embedding has `rows` rows.

    paths: the files of the model's folder by name. config: config.json. pre: the name of the pre-tokenizer, for a
    tokenizer.json that does not determine it. Raises SourceError; RecipeError if `kind` or `pre` is unknown.
    """
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS) or f"use one of {', '.join(KINDS)}"
        raise RecipeError(f"unknown kind of vocabulary: {kind!r}", hint=hint)
    with malformed_as_source_error(paths.get("tokenizer.json", "the tokenizer")):
        keys, notes = KINDS[kind](TokenizerFiles(paths, config, rows, pre))
    return Vocabulary(keys, tuple(dict.fromkeys(note for note in notes if note)), rows)
