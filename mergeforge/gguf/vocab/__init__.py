"""A model's vocabulary as GGUF key/values: all `tokenizer.*` keys from the tokenizer files beside a model.

    vocabulary(files, config, "llama", rows=32000).keys

`kind` says which vocabulary a family has, as llama.cpp's converter knows it from the family:

* `llama`: tokenizer.model (SPM) if there is one, else a byte-fallback tokenizer.json rebuilt as SPM, else
  `gpt2`; with CodeLlama's and Granite's exceptions. `spm_or_gpt2`: the same without the exceptions.
  `spm`: SPM or an error.
* `gpt2`: byte-level BPE from tokenizer.json (or vocab.json and merges.txt).
* `gemma` (Gemma and Gemma 2), `gemma3`: SPM without a space before a text. `gemma4`: BPE over raw UTF-8.
* `phi3`: `gpt2` if the tokenizer says GPT2Tokenizer, else SPM. `internlm2`, `internlm3`: SPM.
* `stablelm`, `glm4`, `glm4_moe` (4.5 and later), `chatglm`: `gpt2`; the GLMs with special tokens of fixed names.
* `bert` (WordPiece), `roberta` (BPE), `unigram` (XLM-RoBERTa: T5's engine). `none`: no vocabulary.

The number of tokens is always the number of rows of the token embedding, since llama.cpp refuses
anything else: missing ones are padded, too many are an error.
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
    """All `tokenizer.*` keys in the converter's order, what a user should know, and the number of tokens."""

    keys: Keys
    notes: tuple[str, ...]
    size: int


def vocabulary(
    files: AuxFiles, config: Mapping[str, Any], kind: str, *, rows: int, pre: str | None = None
) -> Vocabulary:
    """The vocabulary of a model whose token embedding has `rows` rows.

    `files`: name in the model's folder -> where it is; `config`: config.json; `pre`: the pre-tokenizer's
    name, where it cannot be told from tokenizer.json. Raises SourceError, and RecipeError for `pre`.
    """
    if kind not in KINDS:
        raise RecipeError(f"no kind of vocabulary is called {kind!r}", hint=did_you_mean(kind, KINDS))
    with malformed_as_source_error(files.get("tokenizer.json", "the tokenizer")):
        keys, notes = KINDS[kind](TokenizerFiles(files, config, rows, pre))
    return Vocabulary(keys, tuple(dict.fromkeys(note for note in notes if note)), rows)
