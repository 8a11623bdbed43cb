"""The verdict on a run with a preference objective: its numbers, its words, and --fail-if-worse."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.training_runs import losses, run

from mergeforge.cli import run_command
from mergeforge.train.loop.preference import RewardSums
from mergeforge.train.preference_verdict import PreferenceVerdict, make_preference_verdict
from mergeforge.train.run import Trained
from mergeforge.train.verdict import read_verdict

Settings = dict[str, Any]


def verdict_of(trained: Trained) -> PreferenceVerdict:
    assert isinstance(trained.verdict, PreferenceVerdict)
    return trained.verdict


def made(before: list[float], after: list[float], objective: str = "simpo", **facts: Any) -> PreferenceVerdict:
    """The verdict from margins before and after training."""
    rows = [[(margin, float(margin > 0)) for margin in margins] for margins in (before, after)]
    facts = {"metrics": [], "kept_step": 4, "reward_chosen": 0.1} | facts
    return make_preference_verdict(objective, *rows, **facts)


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_margin_and_accuracy_are_those_of_the_validation(objective: str, preferences: Settings) -> None:
    """After the last step, and before the first one: 0 where the base is the reference, measured otherwise."""
    trained = run(preferences, objective=objective, val=8, epochs=2)
    verdict, manifest = verdict_of(trained), json.loads((trained.folder.root / "run.json").read_text())
    assert verdict.margin == pytest.approx(manifest["validation_margin"])
    assert verdict.accuracy == pytest.approx(manifest["validation_accuracy"])
    assert verdict.rows == 8 and verdict.comparison == "better" and verdict.learned
    assert verdict.interval and verdict.interval.low < verdict.interval.difference < verdict.interval.high
    assert verdict.margin_before == 0 if objective == "dpo" else verdict.margin_before != 0
    assert "better than the start: margin" in verdict.lines()[0]
    assert "of the pairs as the data does" in verdict.lines()[1]
    assert "Better than the start" in trained.folder.report.read_text()
    assert read_verdict(manifest["verdict"]) == verdict


def test_the_start_of_an_objective_without_a_reference_is_the_first_validation(preferences: Settings) -> None:
    """Validated after a step whose learning rate is 0, the model has the margin that was measured before it."""
    trained = run(preferences, objective="orpo", val=8, max_steps=1, lr=1e-12)
    assert verdict_of(trained).margin_before == pytest.approx(losses(trained, "eval_margin")[-1], rel=1e-4)


def test_labeled_answers_are_judged_one_by_one(labels: Settings) -> None:
    verdict = verdict_of(run(labels, epochs=2, batch={"size": 8, "micro": 4}, val=10))
    assert verdict.rows == 10 and verdict.margin is not None and verdict.margin > 0
    assert "of the answers as the data does, instead of 50% by chance" in verdict.lines()[1]


def test_fail_if_worse(preferences: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """Trained to prefer the bad answers of rows, and validated on the same rows as they are."""
    rows = [json.loads(line) for line in Path(preferences["data"]).read_text().splitlines()]
    Path("held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    Path(preferences["data"]).write_text("".join(json.dumps(row) + "\n" for row in swapped))
    settings = preferences | {"val": "held-out.jsonl", "after": {"merge": True}, "save": {"best": False}}
    Path("train.yaml").write_text(yaml.safe_dump(settings))
    assert run_command(["train", "train.yaml", "--fail-if-worse", "--device", "cpu"]) == 1
    assert "worse than the start" in capfd.readouterr().err
    assert Path("run/adapter").is_dir() and not Path("run/merged").exists()


def test_the_words_for_typical_results() -> None:
    better, unclear = made([0.0] * 40, [0.5] * 40), made([0.0] * 40, [0.5, -0.5] * 20)
    assert better.comparison == "better" and "fewer than" not in better.lines()[0]
    assert unclear.comparison == "no difference" and "it did not learn" in unclear.lines()[-1]
    assert made([0.5] * 40, [0.0] * 40).is_worse and "fewer than 30 rows" in made([0.0] * 8, [1.0] * 8).lines()[0]
    unlikely = made([], [0.5] * 40, "dpo", reward_chosen=-0.7)
    assert "less likely than in the base (reward -0.7000)" in unlikely.lines()[2]
    rises = [{"step": step, "eval_loss": loss} for step, loss in enumerate((0.6, 0.5, 0.7), start=1)]
    assert "it overfits after step 2" in made([0.0] * 40, [0.5] * 40, metrics=rises).lines()[-1]


def test_without_validation_data_the_training_margin_decides() -> None:
    grows = [{"step": step, "margin": step / 10} for step in range(1, 9)]
    verdict = made([], [], metrics=grows)
    assert verdict.comparison == "" and verdict.learned and not verdict.is_worse
    assert "add val" in verdict.lines()[0] and "grew from 0.1500 to 0.7500" in verdict.lines()[1]
    assert read_verdict(json.loads(json.dumps(asdict(verdict)))) == verdict


def test_rows_are_forgotten_with_the_sums() -> None:
    rewards = RewardSums()
    rewards.add_rows(torch.tensor([0.5, -1.0]), torch.tensor([True, False]))
    assert rewards.rows == [(0.5, 1.0), (-1.0, 0.0)]
    rewards.clear()
    assert rewards.rows == []
