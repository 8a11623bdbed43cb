"""Byte-level BPE: tokens in GPT-2's spelling of bytes, and merges, from tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.vocab.token_decoder import decoded
from mergeforge.gguf.vocab.tokens import CONTROL, NORMAL, SPACE, USER_DEFINED, Tokens, check_rows, looks_special
from mergeforge.tokenizer.hf_files import AddedToken


def bpe_tokens(tokenizer: Mapping[str, Any], added: Mapping[int, AddedToken], rows: int) -> Tokens:
    """The tokens of a BPE or WordPiece vocabulary; raises SourceError when the embedding is too small for it."""
    names = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    stored = {number: one.text for number, one in added.items() if one.stored}
    check_rows([*names, *stored], rows, {**names, **stored}, "tokenizer.json")
    tokens = Tokens.padding(rows)
    for number, text in names.items():
        tokens.put(number, text, NORMAL)
    for number, one in added.items():
        if number < rows:
            tokens.put(number, *_spelled(one, tokenizer.get("decoder")))
        else:
            tokens.notes.append(
                f"tokenizer_config.json names {one.text!r}, which is in no vocabulary and for which the embedding "
                "has no row: left out"
            )
    return tokens


def _spelled(one: AddedToken, decoder: Mapping[str, Any] | None) -> tuple[str, int]:
    text = one.text if one.normalized else decoded(one.text, decoder)
    if "\ufffd" in text:  # a single byte of a letter; llama.cpp's converter loses it
        text = one.text
    if one.special or looks_special(text):
        return text, CONTROL
    return text.replace(SPACE, " "), USER_DEFINED


def merges_of(tokenizer: Mapping[str, Any], file: str) -> list[str]:
    """The merges in order, each as `left right`; a space inside one as U+0120. Raises SourceError without any."""
    merges = tokenizer["model"].get("merges")
    if not merges:
        raise SourceError(
            f"{file} has no merges, without which text cannot be tokenised",
            hint="save the tokenizer again with transformers, or put merges.txt beside it",
        )
    if isinstance(merges[0], str):
        return list(merges)
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]


def merges_of_text(content: str) -> list[str]:
    """The merges of a merges.txt: a pair a line, after an optional first line that starts with #version."""
    lines = content.splitlines()
    pairs = [line.split() for line in (lines[1:] if lines and lines[0].startswith("#") else lines)]
    return [" ".join(pair) for pair in pairs if len(pair) == 2]
