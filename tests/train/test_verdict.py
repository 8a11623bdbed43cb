"""The verdict on a run: compared with `mergeforge compare` on the same rows, and its words for typical curves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.training_runs import run

from mergeforge.cli import run_command
from mergeforge.cli.train import train as train_command
from mergeforge.errors import RecipeError
from mergeforge.eval import compare
from mergeforge.train.plan import make_plan
from mergeforge.train.run import train
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.verdict import make_verdict, read_verdict

Settings = dict[str, Any]


def curve(losses: list[float], validations: list[float]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: a loss at each step, and as many validations at the steps' ends."""
    lines: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    return lines + [{"step": step, "eval_loss": loss} for step, loss in enumerate(validations, start=1)]


def test_the_interval_is_that_of_compare(settings: Settings) -> None:
    plan = make_plan(settings | {"val": 8}, device="cpu")
    verdict = train(plan).verdict
    assert verdict is not None and verdict.interval is not None and verdict.rows == 8
    comparison = compare([plan.folder.adapter], plan.data.validation, device="cpu")  # loads in bf16
    (interval,) = comparison.intervals
    assert verdict.base_loss == pytest.approx(comparison.evaluations[0].nll, rel=1e-3)
    assert verdict.loss == pytest.approx(comparison.evaluations[1].nll, rel=1e-3)
    for name in ("difference", "low", "high"):
        assert getattr(verdict.interval, name) == pytest.approx(getattr(interval, name), rel=2e-2)


def test_full_training_is_compared_with_the_model_before_it(settings: Settings) -> None:
    settings.pop("lora")
    verdict = run(settings, method="full", val=8).verdict
    assert verdict is not None and verdict.comparison == "better" and verdict.learned
    assert "better than the base" in verdict.lines()[0]


def test_a_resumed_run_is_compared_with_the_base(settings: Settings) -> None:
    changes: Settings = {"val": 8, "save": {"every": 3, "best": False}}
    whole = run(settings, **changes)
    run(settings, **changes, max_steps=4, output="resumed")
    RunFolder(Path("resumed")).record((RunFolder(Path("resumed")).manifest() or {}) | {"state": "interrupted"})
    resumed = run(settings, **changes, output="resumed")
    assert resumed.verdict is not None and whole.verdict is not None
    assert resumed.verdict.base_loss == pytest.approx(whole.verdict.base_loss)


def test_fail_if_worse(settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def negated(logits: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count

    monkeypatch.setattr(torch, "negated", negated, raising=False)
    text = settings | {"val": 8, "loss": "torch.negated", "after": {"merge": True}, "save": {"best": False}}
    Path("train.yaml").write_text(yaml.safe_dump(text))
    assert run_command(["train", "train.yaml", "--fail-if-worse", "--device", "cpu"]) == 1
    assert "worse than the base" in capfd.readouterr().err
    assert Path("run/adapter").is_dir() and not Path("run/merged").exists()


def test_fail_if_worse_needs_validation_data(settings: Settings) -> None:
    Path("train.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(RecipeError, match="needs validation data"):
        train_command.main(["train.yaml", "--fail-if-worse", "--device", "cpu"], standalone_mode=False)


def test_overfitting_names_the_step() -> None:
    metrics = curve([3.0, 2.0, 1.0, 0.5], [2.5, 2.0, 2.2, 2.6])
    verdict = make_verdict([(30.0, 10)] * 40, [(20.0, 10)] * 40, metrics, vocabulary=1000, kept_step=2)
    assert verdict.curve.overfits and "it overfits after step 2" in verdict.lines()[-1]
    assert "step 2 was kept" in verdict.lines()[-1]
    steady = make_verdict([], [], curve([3.0, 2.0], [2.5, 2.49, 2.5]), vocabulary=1000, kept_step=3)
    assert not steady.curve.overfits


def test_a_loss_of_a_uniform_guess_is_nothing_learned() -> None:
    guess = math.log(1000)
    verdict = make_verdict(
        [(guess * 10, 10)] * 40, [(guess * 9.9, 10)] * 40, curve([guess] * 8, []), vocabulary=1000, kept_step=8
    )
    assert any("learned next to nothing" in line for line in verdict.lines())
    equal = make_verdict([(20.0, 10)] * 40, [(20.0, 10)] * 40, curve([2.0] * 8, []), vocabulary=1000, kept_step=8)
    assert equal.comparison == "no difference" and any("did not learn" in line for line in equal.lines())


def test_without_validation_data_the_training_loss_decides() -> None:
    verdict = make_verdict([], [], curve([3.0, 2.5, 2.0, 1.0], []), vocabulary=1000, kept_step=4)
    assert verdict.comparison == "" and verdict.learned and not verdict.is_worse
    assert "add val" in verdict.lines()[0] and "fell from 3.0000 to 1.0000" in verdict.lines()[1]
    assert read_verdict(json.loads(json.dumps(asdict(verdict)))) == verdict
