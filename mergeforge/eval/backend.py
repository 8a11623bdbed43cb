"""What can be evaluated and chatted with: the protocol of every backend, and what the backends share.

The shared parts: what a backend returns, rendering a conversation as a prompt, and importing optional packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergeforge.core.messages import WarningText
from mergeforge.data.chat_templates import TemplateError, choose_template
from mergeforge.data.template_probe import adapt_template
from mergeforge.data.tokenizers import tokenize
from mergeforge.errors import MissingExtraError, SourceError, pip_install

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

Messages = Sequence[Mapping[str, str]]
OnText = Callable[[str], object]  # called with each new piece of an answer
ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class PromptTooLong(SourceError):
    """A prompt leaves no room for an answer in the model's context."""


class TokenRow(Protocol):
    """Token ids and labels: the label is the token itself if it is scored, else -100. Not shifted."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...
    @property
    def labels(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class ScoredRow:
    """Sums over the scored tokens of a row: negative log-likelihood in nats, tokens, and top-1 hits."""

    nll: float
    tokens: int
    correct: int


@dataclass(frozen=True)
class Answer:
    """An answer as shown; `ended` by eos, stop, length (`max_tokens`), context (it is full) or interrupted.

    `first`: seconds until the first token; `leaked`: special tokens inside the answer; `finite`: whether every
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
        """Tokens per second after the first one; nan for fewer than two."""
        rest = self.seconds - self.first
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else float("nan")


class ModelBackend(Protocol):
    """A model that scores rows and answers: transformers (with or without an adapter) or llama.cpp."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """model, adapter or gguf."""
        ...

    @property
    def context(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        ...

    @property
    def template(self) -> str:
        """The model's own chat template in Jinja; "" if it has none."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def warnings(self) -> tuple[WarningText, ...]:
        """What makes this model's numbers doubtful, such as a tokenizer that is not its base's."""
        ...

    def score_rows(self, rows: Sequence[TokenRow], *, batch: int | None = None) -> Iterator[tuple[int, ScoredRow]]:
        """(index, score) of every row, in the order that suits the backend."""
        ...

    def text_tokens(self, text: str) -> list[int]:
        """The tokens of a plain text, without a token that begins it."""
        ...

    @property
    def first_token(self) -> int | None:
        """The token that begins every text; None if the model was trained without one."""
        ...

    def logits(self, chunks: Sequence[Sequence[int]], first: int) -> Iterator[NDArray[np.float32]]:
        """For each chunk of tokens, the logits [tokens, vocabulary] after those from position `first` on.

        The last token of a chunk has none after it.
        """
        ...

    def chat(self, messages: Messages, sampling: Sampling, on_text: OnText | None = None) -> Answer:
        """Answer a conversation, rendered with the model's own template; otherwise like `generate`."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling, on_text: OnText | None = None) -> Answer:
        """Continue the prompt's tokens. on_text gets whole characters as they come. Ctrl-C ends the answer.

        Raises PromptTooLong if the context has no room for an answer.
        """
        ...


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str = "auto") -> list[int]:
    """The tokens of a conversation with the generation prompt. Raises SourceError if the template refuses it."""
    try:
        adapted = adapt_template(choose_template(template, tokenizer), tokenizer)
        text = adapted.text(tokenizer, messages, prompt=True)
    except TemplateError as error:
        raise SourceError(str(error)) from None
    return tokenize(tokenizer, [text])[0].ids


def plain_prompt(messages: Messages, eos: str) -> str:
    """What the template `plain` (mergeforge/data/chat_templates.py) makes of a conversation, without Jinja."""
    turns = [
        f"{ROLES.get(message['role'], 'User')}: {message['content']}{eos if message['role'] == 'assistant' else ''}"
        for message in messages
    ]
    return "\n".join([*turns, "Assistant:"])


def require(module: str) -> Any:
    """Import a module of an optional package. Raises MissingExtraError with the pip command."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = pip_install(package.replace("_", "-"))
        raise MissingExtraError(f"this needs {package}: {error}", hint=hint) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings of transformers about things that are done on purpose."""
    logging = require("transformers").utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
