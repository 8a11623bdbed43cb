"""A transformers model, or one with a PEFT adapter, as an Answerer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeforge.data import load_tokenizer
from mergeforge.errors import SourceError
from mergeforge.eval import logprobs
from mergeforge.eval.backend import Answer, Messages, Row, RowScore, Tell
from mergeforge.eval.generate import generate
from mergeforge.eval.load_transformers import Loaded
from mergeforge.eval.prompts import prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

CONTEXT = 4096  # where the configuration names none


@dataclass(frozen=True)
class TorchModel:
    """A loaded model under the name that it was asked for; `disabled`: without its adapter."""

    name: str
    loaded: Loaded
    template: str
    disabled: bool = False
    asked: str = "auto"  # the template to answer with, as `template:` of the data

    @property
    def kind(self) -> str:
        return "adapter" if self.loaded.adapter is not None and not self.disabled else "model"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    @property
    def context(self) -> int:
        config = self.loaded.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or CONTEXT)

    def base(self) -> TorchModel:
        """The base alone, in the same memory: the adapter is disabled, its new tokens cannot come."""
        if self.loaded.adapter is None:
            raise SourceError(f"{self.name} is no adapter", hint="a model has no base to compare with")
        grown = len(self.tokenizer) > self.loaded.rows
        tokenizer = load_tokenizer(self.loaded.base) if grown else self.tokenizer
        return replace(self, name=self.loaded.base, loaded=replace(self.loaded, tokenizer=tokenizer), disabled=True)

    def scores(self, rows: Sequence[Row], *, batch: int | None = None) -> Iterator[tuple[int, RowScore]]:
        """See Answerer."""
        model = self.loaded.model
        found = logprobs.scores(model, rows, batch=batch, device=self.loaded.device, vocabulary=self._vocabulary)
        while True:
            with self._adapter():  # not across a yield: who takes the scores may use the adapter meanwhile
                one = next(found, None)
            if one is None:
                return
            yield one

    def reply(self, messages: Messages, sampling: Sampling, tell: Tell | None = None) -> Answer:
        """See Answerer."""
        return self.answer(prompt_tokens(self.tokenizer, messages, self.asked), sampling, tell)

    def answer(self, prompt: Sequence[int], sampling: Sampling, tell: Tell | None = None) -> Answer:
        """See Answerer."""
        room = self.context - len(prompt)
        with self._adapter():
            return generate(
                self.loaded.model, self.tokenizer, prompt, sampling, tell, room=room, vocabulary=self._vocabulary
            )

    @property
    def _vocabulary(self) -> int | None:
        return self.loaded.rows if self.disabled else None

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        if not self.disabled:
            yield
            return
        with self.loaded.adapter.disable_adapter():
            yield
