"""TrainingVerdict: what a finished run achieved, in numbers and in words.

The rows of the validation data are scored before and after training. The difference of the two comes with the interval
of a paired bootstrap, as in `mergeforge compare`. The losses are also compared with that of a uniform guess,
ln(vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.eval.bootstrap import ConfidenceInterval, paired_bootstrap
from mergeforge.train.compared_run import ComparedRun
from mergeforge.train.loss_curve import LossCurve, first_and_last, loss_curve
from mergeforge.train.preference_verdict import PreferenceVerdict

GUESSING = 0.95  # of ln(vocabulary): a loss above this fraction is hardly better than a uniform guess
LEARNED = 0.02  # fraction by which a loss must fall to count as learned
Scores = Sequence[tuple[float, float]]  # of each row: summed negative log-likelihood in nats, tokens


@dataclass(frozen=True)
class TrainingVerdict(ComparedRun):
    """The losses of a run, in nats per token; None where there is no validation data.

    `base_loss`, `loss`: of the validation rows, before training and with the weights that were kept.
    """

    vocabulary: int
    base_loss: float | None = None
    loss: float | None = None
    first_training_loss: float | None = None
    last_training_loss: float | None = None

    @property
    def learned(self) -> bool:
        """Whether the loss fell: of the validation rows, or of training where there are none."""
        if self.interval:
            return self.comparison == "better"
        first, last = self.first_training_loss, self.last_training_loss
        return first is not None and last is not None and last < first * (1 - LEARNED)

    def lines(self) -> list[str]:
        """The verdict in words, one finding a line."""
        return [
            line for line in (self._better(), *self._perplexity(), self._learned(), self.curve.overfitting()) if line
        ]

    def _better(self) -> str:
        before, after = (f"{math.nan if loss is None else loss:.4f}" for loss in (self.base_loss, self.loss))
        return self.compared_with("the base", f"validation loss {before} before, {after} after training")

    def _perplexity(self) -> list[str]:
        if self.base_loss is None or self.loss is None:
            return []
        before, after = _perplexity(self.base_loss), _perplexity(self.loss)
        words = f"as unsure as between {after} equally likely tokens, instead of {before}"
        return [f"perplexity {before} before, {after} after training: at each token the model is {words}"]

    def _learned(self) -> str:
        loss = self.loss if self.loss is not None else self.last_training_loss
        if loss is None:
            return ""
        guess = math.log(self.vocabulary)
        if self.is_worse and not loss <= GUESSING * guess:
            return f"it has lost what the base knew: {_uniform(self.vocabulary)}; train with a lower lr"
        if loss > GUESSING * guess:
            return f"it has learned next to nothing: {_uniform(self.vocabulary)}; train longer, or with a higher lr"
        if not self.interval and self.learned:
            return f"it learned: the training loss fell from {self.first_training_loss:.4f} to {loss:.4f}"
        if not self.learned:
            return "it did not learn: the loss has not fallen; train longer, try another lr, or check the rows"
        if self.base_loss is not None and self.base_loss > GUESSING * guess:
            return f"the base was guessing: {_uniform(self.vocabulary)}"
        return ""


Verdict = TrainingVerdict | PreferenceVerdict


def make_verdict(
    before: Scores, after: Scores, metrics: Sequence[Mapping[str, Any]], *, vocabulary: int, kept_step: int | None
) -> TrainingVerdict:
    """The verdict from the scores of the same rows before and after training and from the lines of metrics.jsonl."""
    first, last = first_and_last(metrics, "loss")
    curve = loss_curve(metrics, kept_step)
    verdict = TrainingVerdict(vocabulary, first_training_loss=first, last_training_loss=last, curve=curve)
    if not before or len(before) != len(after):
        return verdict
    return replace(
        verdict,
        rows=len(after),
        base_loss=_mean(before),
        loss=_mean(after),
        interval=paired_bootstrap(before, after),
    )


def read_verdict(entry: Mapping[str, Any] | None) -> Verdict | None:
    """The verdict that run.json holds as `dataclasses.asdict`; None for runs of versions without one."""
    if not entry or "curve" not in entry:
        return None
    interval = entry.get("interval")
    parts = {"curve": LossCurve(**entry["curve"]), "interval": ConfidenceInterval(**interval) if interval else None}
    return (PreferenceVerdict if "objective" in entry else TrainingVerdict)(**{**entry, **parts})


def _mean(scores: Scores) -> float:
    return math.fsum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def _uniform(vocabulary: int) -> str:
    return f"a uniform guess among {vocabulary:,} tokens has a loss of {math.log(vocabulary):.2f}"


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700))
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.3g}"
