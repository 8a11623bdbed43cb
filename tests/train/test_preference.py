"""Preference objectives: rewards, packing, chunks, the two loops, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_runs import have_same_adapter, losses, run

from mergeforge.errors import RecipeError, SourceError
from mergeforge.train.loop.preference import RewardSums
from mergeforge.train.loop.setup import make_context, probe_memory
from mergeforge.train.plan import make_plan
from mergeforge.train.settings import read

Settings = dict[str, Any]
OBJECTIVES = ("dpo", "ipo", "orpo", "simpo", "kto")


@pytest.fixture(params=OBJECTIVES)
def any_objective(request: pytest.FixtureRequest, preferences: Settings) -> Settings:
    """Settings of a run with each objective, on data of its format."""
    if request.param == "kto":
        return dict(request.getfixturevalue("labels"))
    return preferences | {"objective": request.param}


def sums_of_first_sequences(settings: Settings, *, packed: bool = True) -> torch.Tensor:
    """The summed loss and the sums of rewards of four sequences, with an adapter that is not zero."""
    plan = make_plan(settings | {"pack": True, "seq_len": 512, "dtype": "fp32"}, device="cpu")
    context, _ = make_context(plan)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in context.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    assert context.preference is not None
    training, rewards = replace(context.preference, packed=packed), RewardSums()
    batch = training.collate([context.train[index] for index in range(4)])
    with torch.no_grad():
        loss = training.loss(context.model, context.model, batch, rewards)
    return torch.cat([loss[None].double(), rewards.values])


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo"])
def test_training_on_pairs_raises_the_margin(objective: str, preferences: Settings) -> None:
    trained = run(preferences, objective=objective, val=8, epochs=2)
    margins = losses(trained, "margin")
    assert margins[-1] > margins[0] and losses(trained, "accuracy")[-1] == 1
    assert losses(trained, "eval_margin")[-1] > 0 and losses(trained, "eval_loss")[-1] < losses(trained)[0]
    manifest, report = json.loads((trained.folder.root / "run.json").read_text()), trained.folder.report.read_text()
    assert manifest["validation_accuracy"] == 1 and manifest["margin"] > 0
    assert "Margin" in report and f"Loss ({objective})" in report


def test_training_with_orpo_lowers_the_loss(preferences: Settings) -> None:
    trained = run(preferences, objective="orpo", epochs=2)
    assert losses(trained)[-1] < losses(trained)[0] - 0.5


def test_training_on_labels_separates_good_answers_from_bad_ones(labels: Settings) -> None:
    trained = run(labels, epochs=2, batch={"size": 8, "micro": 4})
    assert losses(trained)[-1] < losses(trained)[0]
    assert losses(trained, "margin")[-1] > 0.3 and losses(trained, "accuracy")[-1] > 0.6


def test_the_loss_before_training_follows_from_equal_models(preferences: Settings) -> None:
    """The adapter starts at zero, so that every log ratio is 0: dpo is ln 2, ipo (1 / (2 beta)) squared."""
    once: Settings = {"max_steps": 1, "preference": {"beta": 0.25}}
    assert losses(run(preferences, **once)) == pytest.approx([0.6931472])
    assert losses(run(preferences, **once, objective="ipo", output="ipo")) == pytest.approx([4.0])


def test_packed_answers_have_the_losses_of_padded_ones(any_objective: Settings) -> None:
    packed, padded = (sums_of_first_sequences(any_objective, packed=packed) for packed in (True, False))
    assert torch.allclose(packed, padded, rtol=1e-5) and packed[0] != 0


def test_chunks_do_not_change_the_loss(any_objective: Settings) -> None:
    whole, chunked = (sums_of_first_sequences(any_objective | {"memory": {"ce_chunk": chunk}}) for chunk in (0, 7))
    assert torch.allclose(whole, chunked, rtol=1e-5)


def test_both_loops_have_equal_losses(any_objective: Settings) -> None:
    changes: Settings = {"max_steps": 4, "val": 6, "pack": True, "seq_len": 128, "batch": {"size": 6, "micro": 2}}
    trainer = run(any_objective, **changes)
    simple = run(any_objective, **changes, loop="simple", output="simple")
    for name in ("loss", "reward_chosen", "eval_loss", "eval_margin"):
        assert losses(trainer, name) == pytest.approx(losses(simple, name), rel=1e-5, abs=1e-6)


def test_gradient_accumulation_averages_over_pairs(preferences: Settings) -> None:
    """An epoch of 40 pairs ends with a step of 4: in one pass, or in passes of 3 and 1."""
    changes: Settings = {"max_steps": 5, "dtype": "fp32"}
    few = run(preferences, **changes, batch={"size": 12, "micro": 6})
    many = run(preferences, **changes, batch={"size": 12, "micro": 3}, output="many")
    assert losses(few) == pytest.approx(losses(many), rel=1e-5)


@pytest.mark.parametrize(("objective", "method"), [("dpo", "lora"), ("kto", "qlora")])
def test_an_interrupted_run_resumes_bit_for_bit(
    objective: str, method: str, preferences: Settings, request: pytest.FixtureRequest
) -> None:
    settings = request.getfixturevalue("labels") if objective == "kto" else preferences
    changes: Settings = {"method": method, "val": 4, "save": {"every": 3, "best": False}}
    changes |= {"lora": {"r": 4, "dropout": 0.1}, "max_steps": 8}

    def interrupt(line: dict[str, Any]) -> None:
        if line.get("step") == 4 and "loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    whole = run(settings, **changes)
    assert run(settings, listeners=[interrupt], **changes, output="interrupted").interrupted
    resumed = run(settings, **changes, output="interrupted")
    assert losses(resumed) == losses(whole) and losses(resumed, "margin") == losses(whole, "margin")
    assert have_same_adapter(whole, resumed)


def test_the_memory_probe_runs_a_full_batch_and_leaves_no_trace(any_objective: Settings) -> None:
    context, _ = make_context(make_plan(any_objective, device="cpu"))
    state = torch.random.get_rng_state()
    assert probe_memory(context, 64) > 0
    assert torch.random.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in context.model.parameters())


def test_a_pair_fills_two_sequences_in_the_plan(preferences: Settings) -> None:
    padded = make_plan(preferences, device="cpu").resolved.setup
    packed = make_plan(preferences | {"pack": None, "seq_len": 512}, device="cpu").resolved
    assert padded.tokens == 2 * padded.micro_batch * padded.seq_len and padded.extra_passes == 1
    assert packed.pack and packed.setup.tokens == packed.setup.micro_batch * packed.setup.seq_len


def test_a_pair_longer_than_a_packed_sequence_is_refused(preferences: Settings) -> None:
    with pytest.raises(RecipeError, match="both answers of a row must fit"):
        make_plan(preferences | {"pack": True, "seq_len": 48}, device="cpu").packs(packed=True)


REFUSED: list[tuple[Settings, str]] = [
    ({"method": "full"}, "full training has none"),
    ({"lora": {"init": "pissa"}}, "pissa changes the base's weights"),
    ({"loss": "torch.sum"}, "has its own loss"),
    ({"loss_on": "all"}, "has its own loss"),
    ({"preference": {"gamma": 1}}, "dpo has no gamma"),
    ({"preference": {"beta": 0}}, "beta must be more than 0"),
    ({"objective": "sft", "preference": {"beta": 0.1}}, "sft has no beta"),
    ({"objective": "simpo", "preference": {"desirable_weight": 1}}, "simpo has no desirable_weight"),
    ({"objective": "kto", "batch": {"micro": 1}}, "there must be at least 2"),
    ({"data": [{"path": "x.jsonl", "format": "alpaca"}]}, "cannot train on alpaca data"),
    ({"data": [{"path": "x.jsonl", "format": "unpaired_preference"}]}, "cannot train on unpaired_preference data"),
    ({"objective": "sft", "data": [{"path": "x.jsonl", "format": "preference"}]}, "needs a preference objective"),
    ({"objective": "rlhf"}, "objective"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_that_do_not_go_with_the_objective_are_refused(changes: Settings, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read({"model": "m", "data": "x.jsonl", "objective": "dpo"} | changes)
    assert message in str(caught.value)


def test_objectives_without_a_reference_train_whole_models(preferences: Settings) -> None:
    settings = {key: value for key, value in preferences.items() if key != "lora"}
    trained = run(settings, objective="simpo", method="full", lr=1e-3)
    assert losses(trained, "margin")[-1] > losses(trained, "margin")[0]


def test_data_of_another_objective_is_refused(preferences: Settings, labels: Settings) -> None:
    with pytest.raises(SourceError, match="labels its answers as good or bad") as caught:
        make_plan(labels | {"objective": "sft"}, device="cpu")
    assert "objective: kto" in str(caught.value.hint)
    with pytest.raises(SourceError, match="no columns for the format preference"):
        make_plan(labels | {"objective": "dpo"}, device="cpu")


def test_validation_data_in_a_file_has_the_format_of_the_objective(preferences: Settings) -> None:
    rows = Path(preferences["data"]).read_text().splitlines()
    Path("held-out.jsonl").write_text("\n".join(rows[:6]))
    plan = make_plan(preferences | {"val": "held-out.jsonl"}, device="cpu")
    assert plan.data.validation is not None and len(plan.data.validation) == 12 and len(plan.data.train) == 68
