"""An answer by transformers, token by token: whole characters as they come, stop strings, Ctrl-C."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergeforge.data.tokenizers import special_ids
from mergeforge.eval.backend import Answer, Tell, TooLong
from mergeforge.eval.extras import extra, quiet
from mergeforge.eval.stop_strings import StopText, TokenText, decoded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

LEAST = 32  # tokens that a prompt must leave for an answer


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    tell: Tell | None,
    *,
    room: int,
    vocabulary: int | None = None,
) -> Answer:
    """Go on from the prompt for `room` tokens at most. `vocabulary`: only so many tokens can come. Raises TooLong."""
    import torch

    if room < min(sampling.max_tokens, LEAST):
        raise TooLong(f"the prompt's {len(prompt)} tokens leave no room for an answer", hint="shorten it, or /reset")
    watch = _Watch(tokenizer, ends(model, tokenizer), sampling.stop, tell, vocabulary)
    given = torch.tensor([list(prompt)], device=model.get_input_embeddings().weight.device)
    try:
        with quiet(), torch.no_grad(), _seeded(sampling.seed, given.device):
            model.generate(
                given,
                attention_mask=torch.ones_like(given),
                generation_config=_config(sampling, min(sampling.max_tokens, room), watch.ends),
                stopping_criteria=[watch],
                logits_processor=[watch.check],
            )
    except KeyboardInterrupt:
        watch.ended = "interrupted"
    return watch.answer()


def ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, by the model's generation settings and by its tokenizer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = list(named) if isinstance(named, list | tuple) else [named]
    return sorted({int(one) for one in [*found, tokenizer.eos_token_id] if one is not None})


class _Watch:
    """Looks at each token as it is made, and says when to stop."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: list[int],
        stops: Sequence[str],
        tell: Tell | None,
        vocabulary: int | None,
    ) -> None:
        self.ends, self.ended = ends, "length"
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._special = special_ids(tokenizer)
        self._tokens, self._text = TokenText(tokenizer), StopText(stops)
        self._tell = tell or (lambda piece: None)
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self._count, self._finite = 0, True
        self._leaked: dict[str, None] = {}

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        import torch

        done = self._take(int(tokens[0, -1]))
        return torch.full((1,), done, dtype=torch.bool, device=tokens.device)

    def check(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Note what is not a number; take away what is not in the vocabulary."""
        if self._vocabulary is not None:
            scores[:, self._vocabulary :] = float("-inf")
        if bool(scores.isnan().any()) or bool(scores.max().isinf()):
            self._finite = False
            return scores.nan_to_num(nan=0.0, posinf=0.0, neginf=-1e30)
        return scores

    def answer(self) -> Answer:
        if self._text.stopped is None:
            self._show(self._tokens.finish())
            self._tell_some(self._text.finish())
        seconds = (self._last or time.monotonic()) - self._started
        return Answer(self._text.text, self._count, self.ended, seconds, self._first, tuple(self._leaked), self._finite)

    def _take(self, token: int) -> bool:
        self._last = time.monotonic()
        self._first = self._first or self._last - self._started
        if token in self.ends:
            self.ended = "eos"
            return True
        self._count += 1
        if token in self._special:
            self._show(self._tokens.finish())
            name = decoded(self._tokenizer, [token], special=True)
            self._show(name, hidden=True)
            if self._text.stopped is None:
                self._leaked[name] = None
        else:
            self._show(self._tokens.feed(token))
        if self._text.stopped is not None:
            self.ended = "stop"
        return self._text.stopped is not None

    def _show(self, piece: str, *, hidden: bool = False) -> None:
        self._tell_some(self._text.feed(piece, hidden=hidden))

    def _tell_some(self, shown: str) -> None:
        if shown:
            self._tell(shown)


def _config(sampling: Sampling, most: int, ends: list[int]) -> Any:
    transformers = extra("transformers", "train")
    settings: dict[str, Any] = {"max_new_tokens": most, "repetition_penalty": sampling.repetition_penalty}
    settings |= {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0, "num_beams": 1}
    if sampling.temperature > 0:
        settings |= {"do_sample": True, "temperature": sampling.temperature}
        settings |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    else:
        settings |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # its own idea of "not given"
    return transformers.GenerationConfig(**settings)


@contextmanager
def _seeded(seed: int | None, device: Any) -> Iterator[None]:
    """Draw from a seed of its own; what others draw afterwards is as if nothing was drawn here."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(os.urandom(7), "little") if seed is None else seed)
        yield
