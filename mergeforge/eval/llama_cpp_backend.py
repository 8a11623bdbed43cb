"""A GGUF file in llama.cpp as a ModelBackend (package xllamacpp)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.messages import WarningText
from mergeforge.data import IGNORE_INDEX
from mergeforge.data.tokenizers import load_warnings
from mergeforge.eval.backend import (
    Answer,
    Messages,
    OnText,
    PromptTooLong,
    ScoredRow,
    TokenRow,
    plain_prompt,
    prompt_tokens,
)
from mergeforge.eval.gguf_tokenizer import find_tokenizer
from mergeforge.eval.llama_logprobs_process import ScoringProcess
from mergeforge.eval.stop_strings import StopText
from mergeforge.gguf.llama_cpp import ContextError, Engine
from mergeforge.gguf.reader import GGUFHeader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

CONTROL = 3  # llama_token_type of special tokens


@dataclass(frozen=True)
class LlamaCppModel:
    """A GGUF file; llama.cpp loads it on first use.

    `max_context`: tokens of context for answers (scoring uses as many as the rows need); `tokenizer_path`: the folder
    of the tokenizer that scores rows; `template_override`: a chat template instead of the file's own.
    """

    name: str
    path: Path
    header: GGUFHeader
    max_context: int
    tokenizer_path: str | None = None
    template_override: str = "auto"
    kind: str = "gguf"

    @property
    def context(self) -> int:
        architecture = self.header.get("general.architecture")
        return int(self.header.get(f"{architecture}.context_length") or self.max_context)

    @property
    def template(self) -> str:
        return str(self.header.get("tokenizer.chat_template") or "")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the file was made with. Raises SourceError if none matches the file."""
        return find_tokenizer(self.path, self.header, self.tokenizer_path)

    @property
    def warnings(self) -> tuple[WarningText, ...]:
        """See ModelBackend."""
        return load_warnings(self.tokenizer)

    @cached_property
    def special(self) -> Mapping[int, str]:
        """Special tokens: id -> name."""
        kinds = self.header.get("tokenizer.ggml.token_type") or ()
        names = self.header.get("tokenizer.ggml.tokens") or ()
        pairs = enumerate(zip(kinds, names, strict=False))
        return {token: name for token, (kind, name) in pairs if kind == CONTROL}

    def score_rows(self, rows: Sequence[TokenRow], *, batch: int | None = None) -> Iterator[tuple[int, ScoredRow]]:
        """See ModelBackend. One row at a time, in a process of its own; `batch` is ignored."""
        return _score_rows(ScoringProcess(self.path, max((len(row.tokens) for row in rows), default=1)), rows)

    def text_tokens(self, text: str) -> list[int]:
        """See ModelBackend."""
        with closing(ScoringProcess(self.path, 1)) as process:
            return process.tokens(text)

    @property
    def first_token(self) -> int | None:
        """See ModelBackend."""
        is_added = self.header.get("tokenizer.ggml.add_bos_token")
        if is_added is None:  # llama.cpp's default: sentencepiece has one
            is_added = self.header.get("tokenizer.ggml.model") == "llama"
        number = self.header.get("tokenizer.ggml.bos_token_id")
        return int(number) if is_added and number is not None else None

    def logits(self, chunks: Sequence[Sequence[int]], first: int) -> Iterator[NDArray[np.float32]]:
        """See ModelBackend."""
        with closing(ScoringProcess(self.path, max(map(len, chunks), default=1))) as process:
            for chunk in chunks:
                yield process.logits(chunk, first)

    def generate(self, prompt: Sequence[int], sampling: Sampling, on_text: OnText | None = None) -> Answer:
        """See ModelBackend."""
        request = {"prompt": list(prompt), "n_predict": sampling.max_tokens}
        return self._stream(request, sampling, on_text, chat=False)

    def chat(self, messages: Messages, sampling: Sampling, on_text: OnText | None = None) -> Answer:
        """See ModelBackend. llama.cpp renders the file's own template; without one, `plain` is used."""
        if self.template_override != "auto":
            return self.generate(prompt_tokens(self.tokenizer, messages, self.template_override), sampling, on_text)
        if not self.template:
            request: dict[str, Any] = {"prompt": plain_prompt(messages, self._eos), "n_predict": sampling.max_tokens}
            return self._stream(request, sampling, on_text, chat=False)
        request = {"messages": [dict(message) for message in messages], "max_tokens": sampling.max_tokens}
        return self._stream(request | {"logprobs": True, "top_logprobs": 1}, sampling, on_text, chat=True)

    @property
    def _eos(self) -> str:
        names, eos = self.header.get("tokenizer.ggml.tokens") or (), self.header.get("tokenizer.ggml.eos_token_id")
        return str(names[eos]) if eos is not None and eos < len(names) else ""

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.path, context=self._answer_context)

    @property
    def _answer_context(self) -> int:
        return min(self.max_context, self.context)

    def _stream(self, request: dict[str, Any], sampling: Sampling, on_text: OnText | None, *, chat: bool) -> Answer:
        special_names = set(self.special.values())
        preserved = [stop for stop in sampling.stop if stop in special_names]
        request |= sampling_request(sampling, self._answer_context) | {"preserved_tokens": preserved}
        engine = self._engine  # loaded before the clock starts
        monitor = _StreamMonitor(self.special, sampling.stop, on_text)
        try:
            with closing(engine.stream(request, chat=chat)) as chunks:
                for chunk in chunks:
                    if monitor.add_chunk(chunk):
                        break
        except ContextError as error:
            raise PromptTooLong(f"{self.name}: {error}", hint="use a larger --context, or /reset") from None
        except KeyboardInterrupt:
            monitor.ended = "interrupted"
        if monitor.ended == "length" and monitor.all_tokens >= self._answer_context - 1:
            monitor.ended = "context"
        return monitor.answer()


def _score_rows(process: ScoringProcess, rows: Sequence[TokenRow]) -> Iterator[tuple[int, ScoredRow]]:
    """Score the longest rows first, as every backend does; the process ends afterwards."""
    try:
        for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens)):
            row = rows[index]
            scored = [place for place, label in enumerate(row.labels.tolist()) if place and label != IGNORE_INDEX]
            nll, correct = process.score(row.tokens.tolist(), scored)
            yield index, ScoredRow(nll, len(scored), correct)
    finally:
        process.close()


class _StreamMonitor:
    """Takes the chunks of a streamed completion until a stop string has come."""

    def __init__(self, special: Mapping[int, str], stops: Sequence[str], on_text: OnText | None) -> None:
        self.ended = "length"
        self._special = special
        self._text = StopText(stops)
        self._on_text = on_text or (lambda piece: None)
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self._count, self._finite = 0, True
        self.all_tokens = 0  # of prompt and answer
        self._leaked: dict[str, None] = {}

    def add_chunk(self, chunk: Any) -> bool:
        """Add a chunk; returns whether the answer has ended."""
        usage = chunk.get("usage") or {}
        self._count = usage.get("completion_tokens", self._count)
        self.all_tokens = usage.get("total_tokens", self.all_tokens)
        for choice in chunk.get("choices", []):
            self._add_choice(choice)
        if self.ended == "length":  # tokens without text, such as parts of a character, have no chunk in a chat
            timings = chunk.get("timings") or {}
            self._count = timings.get("predicted_n", self._count)
            used = sum(timings.get(name, 0) for name in ("cache_n", "prompt_n", "predicted_n"))
            self.all_tokens = max(self.all_tokens, used)
        return self._text.stopped is not None

    def _add_choice(self, choice: Any) -> None:
        if choice.get("finish_reason"):
            self.ended = "eos" if choice["finish_reason"] == "stop" else "length"
        tokens = (choice.get("logprobs") or {}).get("content") or []
        special = [name for token in tokens for name in self._add_token(token)]
        piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        self._show(self._text.feed(piece, hidden=piece in special))  # preserved_tokens makes the server send it
        if self._text.stopped is not None:
            self.ended = "stop"
        else:
            self._leaked |= dict.fromkeys(special)

    def _add_token(self, token: Any) -> list[str]:
        """Count a token; returns its name if it is a special one."""
        self._last = time.monotonic()
        self._first = self._first or self._last - self._started
        self._count += 1
        self._finite &= token["logprob"] is not None and math.isfinite(token["logprob"])
        return [self._special[token["id"]]] if token["id"] in self._special else []

    def answer(self) -> Answer:
        self._show(self._text.finish())
        seconds = (self._last or time.monotonic()) - self._started
        return Answer(self._text.text, self._count, self.ended, seconds, self._first, tuple(self._leaked), self._finite)

    def _show(self, text: str) -> None:
        if text:
            self._on_text(text)


def sampling_request(sampling: Sampling, context: int) -> dict[str, Any]:
    """The sampling settings of a request, by the names of llama.cpp's server."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context,  # like transformers, which looks at all tokens
        "seed": -1 if sampling.seed is None else sampling.seed,
        "n_probs": 1,
    }
