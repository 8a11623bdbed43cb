"""A GGUF file in llama.cpp as an Answerer (extra `engine`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.eval.backend import UNTRAINED, Answer, Messages, Row, RowScore, Tell, TooLong
from mergeforge.eval.gguf_tokenizer import find_tokenizer
from mergeforge.eval.llama_logprobs_process import ScoringProcess
from mergeforge.eval.prompts import plain_prompt, prompt_tokens
from mergeforge.eval.stop_strings import StopText
from mergeforge.gguf.llama_cpp import ContextError, Engine
from mergeforge.gguf.reader import GGUFHeader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

CONTROL = 3  # llama_token_type of a mark that is no text


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file; llama.cpp loads it when it is first asked.

    `most`: tokens of context to answer in (rows are scored in as many as they have); `tokens_from`: a tokenizer's
    folder, to score rows; `asked`: a chat template over the file's own.
    """

    name: str
    path: Path
    header: GGUFHeader
    most: int
    tokens_from: str | None = None
    asked: str = "auto"
    kind: str = "gguf"

    @property
    def context(self) -> int:
        architecture = self.header.get("general.architecture")
        return int(self.header.get(f"{architecture}.context_length") or self.most)

    @property
    def template(self) -> str:
        return str(self.header.get("tokenizer.chat_template") or "")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the file was made with. Raises SourceError where there is none that agrees with it."""
        return find_tokenizer(self.path, self.header, self.tokens_from)

    @cached_property
    def special(self) -> Mapping[int, str]:
        """Marks that are no text: id -> name."""
        kinds = self.header.get("tokenizer.ggml.token_type") or ()
        names = self.header.get("tokenizer.ggml.tokens") or ()
        return {at: name for at, (kind, name) in enumerate(zip(kinds, names, strict=False)) if kind == CONTROL}

    def scores(self, rows: Sequence[Row], *, batch: int | None = None) -> Iterator[tuple[int, RowScore]]:
        """See Answerer. One row at a time, in a process of its own; `batch` says nothing here."""
        return _scores(ScoringProcess(self.path, max((len(row.tokens) for row in rows), default=1)), rows)

    def answer(self, prompt: Sequence[int], sampling: Sampling, tell: Tell | None = None) -> Answer:
        """See Answerer."""
        return self._stream({"prompt": list(prompt), "n_predict": sampling.max_tokens}, sampling, tell, chat=False)

    def reply(self, messages: Messages, sampling: Sampling, tell: Tell | None = None) -> Answer:
        """See Answerer. llama.cpp renders the file's own template; without one it is the plain one."""
        if self.asked != "auto":
            return self.answer(prompt_tokens(self.tokenizer, messages, self.asked), sampling, tell)
        if not self.template:
            asked: dict[str, Any] = {"prompt": plain_prompt(messages, self._eos), "n_predict": sampling.max_tokens}
            return self._stream(asked, sampling, tell, chat=False)
        asked = {"messages": [dict(message) for message in messages], "max_tokens": sampling.max_tokens}
        return self._stream(asked | {"logprobs": True, "top_logprobs": 1}, sampling, tell, chat=True)

    @property
    def _eos(self) -> str:
        names, at = self.header.get("tokenizer.ggml.tokens") or (), self.header.get("tokenizer.ggml.eos_token_id")
        return str(names[at]) if at is not None and at < len(names) else ""

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.path, context=self._room)

    @property
    def _room(self) -> int:
        return min(self.most, self.context)

    def _stream(self, asked: dict[str, Any], sampling: Sampling, tell: Tell | None, *, chat: bool) -> Answer:
        names = set(self.special.values())
        asked |= drawn(sampling, self._room) | {"preserved_tokens": [stop for stop in sampling.stop if stop in names]}
        engine = self._engine  # loaded before the clock runs
        watch = _Watch(self.special, sampling.stop, tell)
        try:
            with closing(engine.stream(asked, chat=chat)) as chunks:
                for chunk in chunks:
                    if watch.take(chunk):
                        break
        except ContextError as error:
            raise TooLong(f"{self.name}: {error}", hint="a larger --context, or /reset") from None
        except KeyboardInterrupt:
            watch.ended = "interrupted"
        return watch.answer()


def _scores(process: ScoringProcess, rows: Sequence[Row]) -> Iterator[tuple[int, RowScore]]:
    """The longest rows first, as everywhere; the process ends with them."""
    try:
        for at in sorted(range(len(rows)), key=lambda at: -len(rows[at].tokens)):
            counted = [place for place, label in enumerate(rows[at].labels.tolist()) if place and label != UNTRAINED]
            nll, correct = process.score(rows[at].tokens.tolist(), counted)
            yield at, RowScore(nll, len(counted), correct)
    finally:
        process.close()


class _Watch:
    """Takes the chunks of a completion, until a stop string has come."""

    def __init__(self, special: Mapping[int, str], stops: Sequence[str], tell: Tell | None) -> None:
        self.ended = "length"
        self._special = special
        self._text = StopText(stops)
        self._tell = tell or (lambda piece: None)
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self._count, self._finite = 0, True
        self._leaked: dict[str, None] = {}

    def take(self, chunk: Any) -> bool:
        """Whether the answer is at its end."""
        self._count = (chunk.get("usage") or {}).get("completion_tokens", self._count)
        for choice in chunk.get("choices", []):
            self._take(choice)
        return self._text.stopped is not None

    def _take(self, choice: Any) -> None:
        if choice.get("finish_reason"):
            self.ended = "eos" if choice["finish_reason"] == "stop" else "length"
        marks = [mark for one in (choice.get("logprobs") or {}).get("content") or [] for mark in self._token(one)]
        piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        self._show(self._text.feed(piece, hidden=piece in marks))  # a mark is told where a stop string names it
        if self._text.stopped is not None:
            self.ended = "stop"
        else:
            self._leaked |= dict.fromkeys(marks)

    def _token(self, told: Any) -> list[str]:
        """Count a token; its name where it is a mark."""
        self._last = time.monotonic()
        self._first = self._first or self._last - self._started
        self._count += 1
        self._finite &= told["logprob"] is not None and math.isfinite(told["logprob"])
        return [self._special[told["id"]]] if told["id"] in self._special else []

    def answer(self) -> Answer:
        self._show(self._text.finish())
        seconds = (self._last or time.monotonic()) - self._started
        return Answer(self._text.text, self._count, self.ended, seconds, self._first, tuple(self._leaked), self._finite)

    def _show(self, shown: str) -> None:
        if shown:
            self._tell(shown)


def drawn(sampling: Sampling, context: int) -> dict[str, Any]:
    """The request's part that says how tokens are drawn, as llama.cpp's server names it."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context,  # as far back as transformers looks
        "seed": -1 if sampling.seed is None else sampling.seed,
        "n_probs": 1,
    }
