"""The loss (or margin) of single validation rows, measured before and after training for the verdict."""

from __future__ import annotations

from mergeforge.eval import logprobs
from mergeforge.eval.bootstrap import MIN_ROWS
from mergeforge.eval.dataset import has_scored_tokens
from mergeforge.eval.evaluate import evenly_spaced
from mergeforge.train.loop.context import TrainingContext, autocast, validation_sums
from mergeforge.train.loop.preference import RewardSums
from mergeforge.train.plan import TrainPlan

MAX_ROWS = 200
SHARE = 0.05  # of the tokens that are trained on, which scoring may read above MIN_ROWS rows


def score_start(plan: TrainPlan, context: TrainingContext) -> list[tuple[float, float]]:
    """What the verdict needs from before training: the scores of validation rows, or margins for preferences.

    None for objectives with a reference, whose rewards start at 0.
    """
    if context.preference is None:
        return [(nll, tokens) for nll, tokens in score_validation(plan, context)]
    if context.validation is None or context.preference.objective.reference:
        return []
    rewards = RewardSums()
    validation_sums(context.model, context, rewards=rewards)
    return rewards.rows


def score_validation(plan: TrainPlan, context: TrainingContext) -> list[tuple[float, int]]:
    """(nats, tokens) of each of the chosen validation rows; none without validation data.

    Leaves the model as it was, and draws no random number.
    """
    store = plan.data.validation
    if store is None:
        return []
    rows = [row for row in (store[index] for index in _chosen(plan, context)) if has_scored_tokens(row)]
    model = context.base_model
    training = model.training
    model.eval()
    try:
        with autocast(context):
            scores = dict(logprobs.score_rows(model, rows, batch=None, device=context.device))
    finally:
        model.train(training)
    return [(scores[index].nll, scores[index].tokens) for index in range(len(rows))]


def _chosen(plan: TrainPlan, context: TrainingContext) -> list[int]:
    """Evenly spaced rows: at most MAX_ROWS, and no more than are cheap beside the training itself."""
    assert plan.data.validation is not None
    lengths = plan.data.validation.lengths
    trained = plan.data.counts.tokens * context.schedule.epochs
    affordable = int(SHARE * trained / max(float(sum(lengths)) / len(lengths), 1.0))
    return evenly_spaced(len(lengths), min(MAX_ROWS, max(MIN_ROWS, affordable)))
