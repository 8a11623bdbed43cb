"""PreferenceVerdict: what a run with a preference objective achieved, in numbers and in words.

The margin of a validation row is the reward of its good answer minus that of its bad one; of a labeled answer (KTO) its
reward, negated if it is bad. It is measured before and after training, and the difference comes with the interval of a
paired bootstrap. Objectives that compare with the base start with rewards of 0, so they need no measurement before.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.eval.bootstrap import paired_bootstrap
from mergeforge.train.compared_run import ComparedRun
from mergeforge.train.loss_curve import first_and_last, loss_curve
from mergeforge.train.objectives import KTO, OBJECTIVES

CHANCE = 0.5  # accuracy without any preference
OPPOSITE = {"better": "worse", "worse": "better"}  # of a verdict on losses: a larger margin is better
Margins = Sequence[tuple[float, float]]  # of each row: margin, and 1 where the rewards agree with the data, otherwise 0


@dataclass(frozen=True)
class PreferenceVerdict(ComparedRun):
    """Margin and accuracy of the validation rows before training and with the weights that were kept.

    None where there is no validation data. `reward_chosen`: of the good answers. `first_margin`, `last_margin`: of the
    first and last training steps.
    """

    objective: str
    margin_before: float | None = None
    margin: float | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    reward_chosen: float | None = None
    first_margin: float | None = None
    last_margin: float | None = None

    @property
    def comparison(self) -> str:
        """As in ComparedRun, but a larger margin is better, and one that is not a number is worse."""
        if self.margin is not None and not math.isfinite(self.margin):
            return "worse"
        return OPPOSITE.get(super().comparison, super().comparison)

    @property
    def learned(self) -> bool:
        """Whether the margin grew: of the validation rows, or in training where there are none."""
        if self.interval:
            return self.comparison == "better"
        return self.first_margin is not None and self.last_margin is not None and self.last_margin > self.first_margin

    def lines(self) -> list[str]:
        """The verdict in words, one finding a line."""
        lines = (self._better(), self._accuracy(), self._likelihood(), self._learned(), self.curve.overfitting())
        return [line for line in lines if line]

    def _better(self) -> str:
        before, after = (
            f"{math.nan if margin is None else margin:.4f}" for margin in (self.margin_before, self.margin)
        )
        return self.compared_with("the start", f"margin {before} before, {after} after training")

    def _accuracy(self) -> str:
        if self.accuracy is None or self.accuracy_before is None:
            return ""
        verb, rows = ("judge", "answers") if self.objective == KTO else ("order", "pairs")
        before = f"{self.accuracy_before:.0%} {'by chance' if OBJECTIVES[self.objective].reference else 'before'}"
        share = f"{self.accuracy:.0%} of the {rows} as the data does, instead of {before}"
        return f"accuracy {self.accuracy:.4f}: the rewards {verb} {share}"

    def _likelihood(self) -> str:
        """Preference training may raise the margin by making both answers unlikely, the bad one more so."""
        if not OBJECTIVES[self.objective].reference or (self.reward_chosen or 0.0) >= 0:
            return ""
        text = f"the good answers became less likely than in the base (reward {self.reward_chosen:.4f})"
        return f"{text}: read some samples; a lower lr, a higher beta or `objective: orpo` keeps them likely"

    def _learned(self) -> str:
        if self.learned and self.interval:
            return ""
        if self.learned:
            return f"it learned: the training margin grew from {self.first_margin:.4f} to {self.last_margin:.4f}"
        return "it did not learn: the margin has not grown; train longer, try another lr, or check the rows"


def make_preference_verdict(
    objective: str,
    before: Margins,
    after: Margins,
    metrics: Sequence[Mapping[str, Any]],
    *,
    kept_step: int | None,
    reward_chosen: float | None,
) -> PreferenceVerdict:
    """The verdict from the margins of the same rows before and after training and from the lines of metrics.jsonl.

    `before` may be empty for objectives with a reference.
    """
    if OBJECTIVES[objective].reference:
        before = [(0.0, CHANCE)] * len(after)
    first, last = first_and_last(metrics, "margin")
    verdict = PreferenceVerdict(
        objective,
        curve=loss_curve(metrics, kept_step),
        reward_chosen=reward_chosen,
        first_margin=first,
        last_margin=last,
    )
    if not after or len(before) != len(after):
        return verdict
    interval = paired_bootstrap([(margin, 1) for margin, _ in before], [(margin, 1) for margin, _ in after])
    return replace(
        verdict,
        rows=len(after),
        margin_before=_mean(margin for margin, _ in before),
        margin=_mean(margin for margin, _ in after),
        accuracy_before=_mean(agrees for _, agrees in before),
        accuracy=_mean(agrees for _, agrees in after),
        interval=interval,
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
