"""The tokens of a vocabulary as GGUF lists them: text, type and, for some vocabularies, a score each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mergeforge.errors import SourceError, format_list
from mergeforge.gguf.key_values import Keys, array

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0
SPACE = "\u2581"  # how sentencepiece spells a space


@dataclass
class Tokens:
    """Tokens by id, filled in one after another; an id that none takes is padding, `[PADid]`."""

    texts: list[str]
    types: list[int]
    scores: list[float]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def padding(cls, rows: int) -> Tokens:
        return cls([f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows, [PADDING_SCORE] * rows)

    def put(self, number: int, text: str, kind: int, score: float = 0.0) -> None:
        self.texts[number], self.types[number], self.scores[number] = text, kind, score

    def __len__(self) -> int:
        return len(self.texts)

    def keys(self, *, scores: bool) -> Keys:
        keys = {"tokenizer.ggml.tokens": array("string", self.texts)}
        if scores:
            keys["tokenizer.ggml.scores"] = array("f32", self.scores)
        return {**keys, "tokenizer.ggml.token_type": array("i32", self.types)}


def looks_special(text: str) -> bool:
    """Whether a token that is not marked special is meant so: DeepSeek, Command-R and Gemma have such."""
    shapes = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    named = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return named or any(text.startswith(first) and text.endswith(last) for first, last in shapes)


def check_rows(ids: Iterable[int], rows: int, names: dict[int, str], file: str) -> None:
    """Raises SourceError when the vocabulary has ids that the embedding has no row for."""
    outside = sorted(number for number in ids if number >= rows)
    if outside:
        shown = format_list([f"{names[number]!r} ({number})" for number in outside])
        raise SourceError(
            f"{file} has token ids up to {outside[-1]}, the token embedding has only {rows} rows: {shown}",
            hint="take the tokenizer that belongs to these weights, remove these tokens from it, or give the merge "
            "a base whose embedding was resized with them",
        )


def check_distinct(tokens: Tokens) -> None:
    """Raises SourceError for a text that two ids have: llama.cpp aborts when it loads such a file."""
    if len(set(tokens.texts)) == len(tokens):
        return
    seen: dict[str, int] = {}
    twice = [f"{text!r} ({seen[text]} and {i})" for i, text in enumerate(tokens.texts) if seen.setdefault(text, i) != i]
    raise SourceError(
        f"the vocabulary has {len(twice)} texts with two ids: {format_list(twice)}; llama.cpp cannot load that",
        hint="rename one of each in tokenizer.json",
    )


def padded_note(tokens: Tokens) -> str:
    """What to say when the embedding has more rows than there are tokens; "" when it has not."""
    missing = sum(
        kind == UNUSED and text.startswith("[PAD") for text, kind in zip(tokens.texts, tokens.types, strict=True)
    )
    return f"{missing} of {len(tokens)} rows of the embedding have no token: listed as unused [PADn]" if missing else ""
