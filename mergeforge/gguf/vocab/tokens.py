"""The tokens of a GGUF vocabulary: a text, a type and, for some vocabularies, a score for each id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.key_values import Keys, array

# Token types, numbered as in llama.cpp and in sentencepiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# The scores that llama.cpp's converter writes for added tokens and for padding.
ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0
SPACE = "\u2581"  # sentencepiece writes a space like this


@dataclass
class GGUFTokens:
    """Tokens by id. An id without a token is padding: the text `[PADid]`, of type UNUSED."""

    texts: list[str]
    types: list[int]
    scores: list[float]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def padding(cls, rows: int) -> GGUFTokens:
        return cls([f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows, [PADDING_SCORE] * rows)

    def put(self, token_id: int, text: str, token_type: int, score: float = 0.0) -> None:
        self.texts[token_id], self.types[token_id], self.scores[token_id] = text, token_type, score

    def __len__(self) -> int:
        return len(self.texts)

    def keys(self, *, scores: bool) -> Keys:
        keys = {"tokenizer.ggml.tokens": array("string", self.texts)}
        if scores:
            keys["tokenizer.ggml.scores"] = array("f32", self.scores)
        return {**keys, "tokenizer.ggml.token_type": array("i32", self.types)}


def added_token(text: str, special: bool) -> tuple[str, int]:
    """The text of an added token as llama.cpp searches for it, and the token's type."""
    if special or _looks_special(text):
        return text, CONTROL
    return text.replace(SPACE, " "), USER_DEFINED


def _looks_special(text: str) -> bool:
    """Whether a token is meant as special although it is not marked so, as in DeepSeek, Command-R and Gemma."""
    delimiters = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    known = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return known or any(text.startswith(start) and text.endswith(end) for start, end in delimiters)


def check_rows(texts: Mapping[int, str], rows: int, file: str) -> None:
    """Check that the token embedding has a row for every id in `texts`. Raises SourceError."""
    outside = sorted(token_id for token_id in texts if token_id >= rows)
    if outside:
        listed = format_list([f"{texts[token_id]!r} ({token_id})" for token_id in outside])
        raise SourceError(
            f"{file} has token ids up to {outside[-1]}, but the token embedding has only {rows} rows. "
            f"Tokens without a row: {listed}",
            hint="use the tokenizer that belongs to these weights, remove these tokens from it, or use a base model "
            "whose embedding was resized for them",
        )


def check_distinct(tokens: GGUFTokens) -> None:
    """Check that no two ids share a text: llama.cpp aborts when it loads such a file. Raises SourceError."""
    if len(set(tokens.texts)) == len(tokens):
        return
    first_ids: dict[str, int] = {}
    duplicates = [
        f"{text!r} ({first_ids[text]} and {i})"
        for i, text in enumerate(tokens.texts)
        if first_ids.setdefault(text, i) != i
    ]
    raise SourceError(
        f"the vocabulary gives the same text two ids, which llama.cpp cannot load: {format_list(duplicates)}",
        hint="rename one token of each pair in tokenizer.json",
    )


def padding_note(tokens: GGUFTokens) -> str:
    """A note on embedding rows that have no token; "" if there are none."""
    count = sum(
        token_type == UNUSED and text.startswith("[PAD")
        for text, token_type in zip(tokens.texts, tokens.types, strict=True)
    )
    return f"{count} of {len(tokens)} embedding rows have no token; they become unused tokens [PADn]" if count else ""
