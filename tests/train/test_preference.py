"""Preference objectives: losses and curves against TRL's own trainers, packing, resuming, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from support.training_runs import losses, run

Settings = dict[str, Any]
PAIRED = ("dpo", "ipo", "orpo", "simpo")


@pytest.mark.parametrize("objective", PAIRED)
def test_training_on_pairs_raises_the_margin(objective: str, preferences: Settings) -> None:
    trained = run(preferences, objective=objective, val=8, epochs=2)
    margins, accuracies = losses(trained, "margin"), losses(trained, "accuracy")
    assert margins[-1] > margins[0] and accuracies[-1] > 0.9
    assert losses(trained, "eval_margin")[-1] > 0 and losses(trained, "eval_loss")[-1] < losses(trained)[0]
