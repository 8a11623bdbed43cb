"""How far a model's next-token distributions are from those of another model over a text: what quantizing costs.

Measured as llama.cpp's llama-perplexity --kl-divergence does: the text is cut into chunks of `context` tokens, and the
second half of each is scored, so that every token is predicted from at least half a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval.backend import ModelBackend

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

CONTEXT = 512  # llama-perplexity's default
ROWS = 64  # of logits that are in memory in float64 at a time
Progress = Callable[[int, int], object]  # chunks done, chunks in total


@dataclass(frozen=True)
class Divergence:
    """How far `model` is from `reference`, over the scored tokens.

    divergences: KL(reference, model) of each token in nats. nll, reference_nll: negative log-likelihood of the text's
    own tokens. same_top: whether both models rank the same token first.
    """

    model: str
    reference: str
    divergences: Numbers
    nll: Numbers
    reference_nll: Numbers
    same_top: NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        return len(self.nll)

    @property
    def kl_divergence(self) -> float:
        """Mean KL divergence of a token, in nats."""
        return float(self.divergences.mean())

    @property
    def kl_error(self) -> float:
        """Standard error of the mean KL divergence."""
        return float(self.divergences.std(ddof=1) / math.sqrt(self.tokens)) if self.tokens > 1 else math.nan

    @property
    def agreement(self) -> float:
        """Share of tokens for which both models rank the same token first."""
        return float(self.same_top.mean())

    @property
    def perplexity(self) -> float:
        return float(math.exp(self.nll.mean()))

    @property
    def reference_perplexity(self) -> float:
        return float(math.exp(self.reference_nll.mean()))

    @property
    def ratio(self) -> float:
        """Perplexity compared with the reference's: 1.02 is 2 % worse."""
        return float(math.exp((self.nll - self.reference_nll).mean()))

    def quantile(self, share: float) -> float:
        """The KL divergence that this share of the tokens does not exceed."""
        import numpy as np

        return float(np.quantile(self.divergences, share))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        names = ("tokens", "kl_divergence", "kl_error", "agreement", "perplexity", "reference_perplexity", "ratio")
        facts = {"model": self.model, "reference": self.reference, **{name: getattr(self, name) for name in names}}
        return facts | {"kl_median": self.quantile(0.5), "kl_99": self.quantile(0.99), "kl_max": self.quantile(1)}


def compare_distributions(
    model: ModelBackend,
    reference: ModelBackend,
    text: str,
    *,
    context: int = CONTEXT,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Measure a model against a reference over a text.

    context: tokens of a chunk. limit: chunks to score at most, from the beginning. Of vocabularies of different sizes
    (padding), the common part counts. Raises SourceError if the models cut the text into different tokens, and if the
    text is shorter than one chunk.
    """
    tokens = _tokens(model, reference, text)
    chunks = [tokens[start : start + context] for start in range(0, len(tokens) - context + 1, context)][:limit]
    if not chunks:
        hint = "name a longer text, or a smaller --chunk"
        raise SourceError(f"the text has {len(tokens)} tokens, fewer than one chunk of {context}", hint=hint)
    if (begin := model.first_token) is not None:
        chunks = [[begin, *chunk[1:]] for chunk in chunks]
    first = context // 2
    parts = []
    pairs = zip(chunks, model.logits(chunks, first), reference.logits(chunks, first), strict=True)
    for done, (chunk, logits, expected) in enumerate(pairs, 1):
        parts.append(_compare_chunk(chunk[first + 1 :], logits, expected))
        if progress:
            progress(done, len(chunks))
    import numpy as np

    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Divergence(model.name, reference.name, *columns)


def read_text(path: str) -> str:
    """The text of a file. Raises SourceError."""
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as text: {error}", hint="name a file of plain UTF-8 text") from None


def _tokens(model: ModelBackend, reference: ModelBackend, text: str) -> list[int]:
    """The tokens of the text, which are the same for both models."""
    if not text.strip():
        raise RecipeError("the text is empty")
    tokens, others = model.text_tokens(text), reference.text_tokens(text)
    if tokens != others:
        at = next((at for at, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]), len(tokens))
        names = f"{model.name} and {reference.name}"
        text = f"{names} cut the text into different tokens, from token {at + 1} on"
        raise SourceError(text, hint="compare models with the same tokenizer")
    return tokens


def _compare_chunk(
    targets: Sequence[int], logits: NDArray[np.float32], expected: NDArray[np.float32]
) -> tuple[Numbers, Numbers, Numbers, NDArray[np.bool_]]:
    """(KL divergence, NLL, the reference's NLL, same top token) of each token of a chunk."""
    import numpy as np

    vocabulary = min(logits.shape[1], expected.shape[1])  # files may have padding after the last token
    if max(targets) >= vocabulary:
        text = f"the text has token {max(targets)}, but one of the models predicts only {vocabulary} tokens"
        raise SourceError(text, hint="compare models with the same tokenizer")
    if not np.isfinite(logits).all() or not np.isfinite(expected).all():
        hint = "`mergeforge eval --smoke` shows which model's"
        raise SourceError("a model's predictions are not numbers", hint=hint)
    parts = []
    for start in range(0, len(targets), ROWS):
        rows = np.arange(len(targets[start : start + ROWS]))
        own, other = (_log_softmax(one[start : start + ROWS, :vocabulary]) for one in (logits, expected))
        divergence = (np.exp(other) * (other - own)).sum(axis=1)
        target = np.asarray(targets[start : start + ROWS])
        same = own.argmax(axis=1) == other.argmax(axis=1)
        parts.append((divergence, -own[rows, target], -other[rows, target], same))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def _log_softmax(logits: NDArray[np.float32]) -> Numbers:
    import numpy as np

    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values
