"""Marking: an example as text again, in runs of tokens that are trained on or are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from mergeforge.data.render import UNTRAINED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Run:
    """Text of neighbouring tokens, special ones and all; whether these are trained on."""

    text: str
    trained: bool


def runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Run]:
    """The example from its first to its last token."""
    ids, before, at = example.tokens.tolist(), "", 0
    for trained, group in groupby(label != UNTRAINED for label in example.labels.tolist()):
        at += len(list(group))
        until = str(tokenizer.decode(ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield Run(until[len(before) :], trained)  # decoders strip a text's first space, so no run is decoded alone
        before = until


def marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as plain text with what is trained on between ⟦ and ⟧."""
    return "".join(f"{OPEN}{run.text}{CLOSE}" if run.trained else run.text for run in runs(example, tokenizer))
