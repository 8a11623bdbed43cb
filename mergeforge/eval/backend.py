"""What can be evaluated and talked to: the protocol that every back end keeps, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mergeforge.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

Messages = Sequence[Mapping[str, str]]
Tell = Callable[[str], object]
UNTRAINED = -100  # the label of a token that does not count


class TooLong(SourceError):
    """A prompt leaves no room for an answer in the model's context."""


class Row(Protocol):
    """Tokens, and for each the label: the token itself where it counts, else -100. Not shifted."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...
    @property
    def labels(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class RowScore:
    """Sums over a row's counted tokens: negative log-likelihood in nats, tokens, how many were the likeliest one."""

    nll: float
    tokens: int
    correct: int


@dataclass(frozen=True)
class Answer:
    """An answer as it was shown; `ended` by eos, stop, length (of `max_tokens` or the context) or interrupted.

    `first`: seconds until the first token; `leaked`: special tokens that stand in the answer; `finite`: whether every
    probability was a number.
    """

    text: str
    tokens: int
    ended: str
    seconds: float
    first: float
    leaked: tuple[str, ...] = ()
    finite: bool = True

    @property
    def speed(self) -> float:
        """Tokens a second after the first one; nan for fewer than two."""
        rest = self.seconds - self.first
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else float("nan")


class Answerer(Protocol):
    """A model that scores rows and answers: transformers (with or without an adapter) or llama.cpp."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """model, adapter or gguf."""
        ...

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        ...

    @property
    def template(self) -> str:
        """Its own chat template in Jinja; "" where it has none."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def scores(self, rows: Sequence[Row], *, batch: int | None = None) -> Iterator[tuple[int, RowScore]]:
        """(index, score) of every row, in the order that suits the model."""
        ...

    def reply(self, messages: Messages, sampling: Sampling, tell: Tell | None = None) -> Answer:
        """Answer a conversation in the model's own template; the rest as `answer`."""
        ...

    def answer(self, prompt: Sequence[int], sampling: Sampling, tell: Tell | None = None) -> Answer:
        """Go on from the prompt's tokens; `tell` gets whole characters as they come. Ctrl-C ends the answer.

        Raises TooLong when the context has no room for it.
        """
        ...
