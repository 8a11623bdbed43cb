"""An answer by transformers, token by token: whole characters as they come, stop strings, Ctrl-C."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergeforge.data.tokenizers import special_ids
from mergeforge.eval.backend import Answer, OnText, PromptTooLong, quiet_transformers, require
from mergeforge.eval.stop_strings import IncrementalDecoder, StopText, decode

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

MIN_ANSWER_TOKENS = 32  # that a prompt must leave room for


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    on_text: OnText | None,
    *,
    max_new_tokens: int,
    vocabulary: int | None = None,
) -> Answer:
    """Continue the prompt by at most `max_new_tokens` tokens.

    vocabulary: only token ids below it may be drawn. Raises PromptTooLong.
    """
    import torch

    if max_new_tokens < min(sampling.max_tokens, MIN_ANSWER_TOKENS):
        raise PromptTooLong(
            f"the prompt's {len(prompt)} tokens leave no room for an answer", hint="shorten it, or use /reset"
        )
    monitor = _StopMonitor(tokenizer, end_tokens(model, tokenizer), sampling.stop, on_text, vocabulary)
    inputs = torch.tensor([list(prompt)], device=model.get_input_embeddings().weight.device)
    try:
        with quiet_transformers(), torch.no_grad(), _seeded(sampling.seed, inputs.device):
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=_config(sampling, min(sampling.max_tokens, max_new_tokens), monitor.ends),
                stopping_criteria=[monitor],
                logits_processor=[monitor.check],
            )
    except KeyboardInterrupt:
        monitor.ended = "interrupted"
    if monitor.ended == "length" and max_new_tokens < sampling.max_tokens:
        monitor.ended = "context"
    return monitor.answer()


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, from the model's generation settings and its tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    candidates = list(configured) if isinstance(configured, list | tuple) else [configured]
    return sorted({int(token) for token in [*candidates, tokenizer.eos_token_id] if token is not None})


class _StopMonitor:
    """Sees each token as it is generated, and decides when to stop."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: list[int],
        stops: Sequence[str],
        on_text: OnText | None,
        vocabulary: int | None,
    ) -> None:
        self.ends, self.ended = ends, "length"
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._special = special_ids(tokenizer)
        self._decoder, self._text = IncrementalDecoder(tokenizer), StopText(stops)
        self._on_text = on_text or (lambda piece: None)
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self._count, self._finite = 0, True
        self._leaked: dict[str, None] = {}

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        """transformers' StoppingCriteria."""
        import torch

        done = self._add_token(int(tokens[0, -1]))
        return torch.full((1,), done, dtype=torch.bool, device=tokens.device)

    def check(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """transformers' LogitsProcessor: notes NaN and infinity, and masks tokens outside the vocabulary."""
        if self._vocabulary is not None:
            scores[:, self._vocabulary :] = float("-inf")
        if bool(scores.isnan().any()) or bool(scores.max().isinf()):
            self._finite = False
            return scores.nan_to_num(nan=0.0, posinf=0.0, neginf=-1e30)
        return scores

    def answer(self) -> Answer:
        if self._text.stopped is None:
            self._add_text(self._decoder.finish())
            self._show(self._text.finish())
        seconds = (self._last or time.monotonic()) - self._started
        return Answer(self._text.text, self._count, self.ended, seconds, self._first, tuple(self._leaked), self._finite)

    def _add_token(self, token: int) -> bool:
        self._last = time.monotonic()
        self._first = self._first or self._last - self._started
        if token in self.ends:
            self.ended = "eos"
            return True
        self._count += 1
        if token in self._special:
            self._add_text(self._decoder.finish())
            name = decode(self._tokenizer, [token], special=True)
            self._add_text(name, hidden=True)
            if self._text.stopped is None:
                self._leaked[name] = None
        else:
            self._add_text(self._decoder.feed(token))
        if self._text.stopped is not None:
            self.ended = "stop"
        return self._text.stopped is not None

    def _add_text(self, piece: str, *, hidden: bool = False) -> None:
        self._show(self._text.feed(piece, hidden=hidden))

    def _show(self, text: str) -> None:
        if text:
            self._on_text(text)


def _config(sampling: Sampling, max_new_tokens: int, ends: list[int]) -> Any:
    transformers = require("transformers")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": sampling.repetition_penalty}
    settings |= {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0, "num_beams": 1}
    if sampling.temperature > 0:
        settings |= {"do_sample": True, "temperature": sampling.temperature}
        settings |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    else:
        settings |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults
    return transformers.GenerationConfig(**settings)


@contextmanager
def _seeded(seed: int | None, device: Any) -> Iterator[None]:
    """Draw from a separate seed, and restore torch's random state afterwards."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(os.urandom(7), "little") if seed is None else seed)
        yield
