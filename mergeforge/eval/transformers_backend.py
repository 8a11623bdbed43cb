"""A transformers model, with or without a PEFT adapter, as a ModelBackend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeforge.core.messages import WarningText
from mergeforge.data import load_tokenizer
from mergeforge.data.tokenizers import load_warnings
from mergeforge.errors import SourceError
from mergeforge.eval import logprobs
from mergeforge.eval.backend import Answer, Messages, OnText, ScoredRow, TokenRow, prompt_tokens
from mergeforge.eval.generate import generate
from mergeforge.eval.load_transformers import LoadedModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from mergeforge.eval.sampling import Sampling

CONTEXT = 4096  # if the configuration names none


@dataclass(frozen=True)
class TransformersModel:
    """A loaded model and the name it was opened by.

    `adapter_disabled`: run without its adapter; `template_override`: a chat template instead of its own, as `template:`
    in the settings of training data.
    """

    name: str
    loaded: LoadedModel
    template: str
    adapter_disabled: bool = False
    template_override: str = "auto"

    @property
    def kind(self) -> str:
        return "adapter" if self.loaded.adapter is not None and not self.adapter_disabled else "model"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    @property
    def warnings(self) -> tuple[WarningText, ...]:
        """See ModelBackend."""
        own = () if self.adapter_disabled else self.loaded.warnings
        return (*load_warnings(self.tokenizer), *own)

    @property
    def context(self) -> int:
        config = self.loaded.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or CONTEXT)

    def base(self) -> TransformersModel:
        """The base model in the same memory: the adapter is disabled, and its new tokens cannot be drawn."""
        if self.loaded.adapter is None:
            raise SourceError(f"{self.name} is not an adapter", hint="only an adapter has a base to compare with")
        differs = len(self.tokenizer) > self.loaded.base_vocab_size or self.loaded.warnings
        tokenizer = load_tokenizer(self.loaded.base) if differs else self.tokenizer
        loaded = replace(self.loaded, tokenizer=tokenizer)
        return replace(self, name=self.loaded.base, loaded=loaded, adapter_disabled=True)

    def score_rows(self, rows: Sequence[TokenRow], *, batch: int | None = None) -> Iterator[tuple[int, ScoredRow]]:
        """See ModelBackend."""
        scores = logprobs.score_rows(
            self.loaded.model, rows, batch=batch, device=self.loaded.device, vocabulary=self._vocabulary
        )
        while True:
            with self._adapter():  # not across a yield: the caller may use the adapter in between
                score = next(scores, None)
            if score is None:
                return
            yield score

    def text_tokens(self, text: str) -> list[int]:
        """See ModelBackend."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def first_token(self) -> int | None:
        """See ModelBackend."""
        first = self.tokenizer("a", add_special_tokens=True)["input_ids"][0]
        return int(first) if first == self.tokenizer.bos_token_id else None

    def logits(self, chunks: Sequence[Sequence[int]], first: int) -> Iterator[NDArray[np.float32]]:
        """See ModelBackend."""
        for chunk in chunks:
            with self._adapter():
                logits = logprobs.chunk_logits(self.loaded.model, chunk, first, self.loaded.device)
            yield logits[:, : self._vocabulary]

    def chat(self, messages: Messages, sampling: Sampling, on_text: OnText | None = None) -> Answer:
        """See ModelBackend."""
        return self.generate(prompt_tokens(self.tokenizer, messages, self.template_override), sampling, on_text)

    def generate(self, prompt: Sequence[int], sampling: Sampling, on_text: OnText | None = None) -> Answer:
        """See ModelBackend."""
        with self._adapter():
            return generate(
                self.loaded.model,
                self.tokenizer,
                prompt,
                sampling,
                on_text,
                max_new_tokens=self.context - len(prompt),
                vocabulary=self._vocabulary,
            )

    @property
    def _vocabulary(self) -> int | None:
        return self.loaded.base_vocab_size if self.adapter_disabled else None

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        if not self.adapter_disabled:
            yield
            return
        with self.loaded.adapter.disable_adapter():
            yield
