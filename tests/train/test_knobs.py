"""Settings of the field: schedules, LoRA+ and NEFTune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.training_runs import have_same_adapter, losses, run

from mergeforge.errors import RecipeError
from mergeforge.train.loop.hf_trainer import arguments
from mergeforge.train.loop.optimizer import make_optimizer
from mergeforge.train.loop.setup import make_context
from mergeforge.train.plan import make_plan
from mergeforge.train.settings import read

Settings = dict[str, Any]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "cosine", "min_lr_ratio": 0.1}, {1: 1, 10: 0.1 + 0.9 * 0.0245}),
        ({"schedule": "linear"}, {1: 1, 4: 0.7, 10: 0.1}),
        ({"schedule": "constant"}, {1: 1, 10: 1}),
        ({"schedule": "wsd", "decay": 0.4, "min_lr_ratio": 0.5}, {1: 1, 7: 1, 9: 0.75}),
    ],
    ids=lambda value: str(value.get("schedule", "")),
)
def test_schedules_have_their_shape_in_both_loops(
    changes: Settings, expected: dict[int, float], settings: Settings
) -> None:
    """Rates of ten steps without warmup, as fractions of lr."""
    settings |= changes | {"warmup": 0, "eval": {"max_tokens": 1}}
    trainer, simple = run(settings), run(settings, loop="simple", output="simple")
    rates = [rate / 3e-3 for rate in losses(trainer, "lr")]
    assert len(rates) == 10 and losses(simple, "lr") == pytest.approx(losses(trainer, "lr"))
    for step, fraction in expected.items():
        assert rates[step - 1] == pytest.approx(fraction, abs=2e-3), rates


def test_lora_plus_is_pefts(settings: Settings) -> None:
    """The learning rate of every parameter, against peft.optimizers.create_loraplus_optimizer."""
    from peft.optimizers import create_loraplus_optimizer

    context, _ = make_context(make_plan(settings | {"lora": {"r": 4, "lr_ratio": 8}}, device="cpu"))
    ours = make_optimizer(context.model, arguments(context), 8)
    peft = create_loraplus_optimizer(context.model, torch.optim.AdamW, lr=context.lr, loraplus_lr_ratio=8)
    rates = [
        {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in (ours, peft)
    ]
    assert rates[0] == rates[1] and set(rates[0].values()) == {context.lr, context.lr * 8}


def test_lora_plus_trains_alike_in_both_loops(settings: Settings) -> None:
    settings |= {"lora": {"r": 4, "lr_ratio": 8}}
    trainer, simple = run(settings), run(settings, loop="simple", output="simple")
    assert losses(trainer) == pytest.approx(losses(simple), rel=1e-5)
    assert losses(trainer)[-1] != pytest.approx(losses(run(settings, lora={"r": 4}, output="plain"))[-1], rel=1e-3)


def test_noise_is_on_in_training_only_and_has_the_papers_size(settings: Settings) -> None:
    plan = make_plan(settings | {"neftune": 10, "dtype": "fp32"}, device="cpu")
    context, _ = make_context(plan)
    embedding, ids = context.base_model.get_input_embeddings(), torch.arange(24).view(2, 12)
    context.model.eval()
    plain = embedding(ids)
    assert embedding(ids).equal(plain)
    context.model.train()
    noise = embedding(ids) - plain
    largest = 10 / (12 * plain.shape[-1]) ** 0.5
    assert 0.9 * largest < float(noise.abs().max()) <= largest * (1 + 1e-5) and abs(float(noise.mean())) < largest / 10


def test_noise_is_drawn_alike_when_a_run_is_repeated(settings: Settings) -> None:
    first, second = run(settings, neftune=5, val=4), run(settings, neftune=5, val=4, output="second")
    assert have_same_adapter(first, second)
    assert losses(first) != losses(run(settings, val=4, output="plain"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear", "min_lr_ratio": 0.1}, "schedule: linear has no min_lr_ratio"),
        ({"decay": 0.1}, "schedule: cosine has no decay"),
        ({"lora": {"lr_ratio": 0}}, "lr_ratio must be more than 0"),
    ],
)
def test_settings_without_an_effect_are_refused(changes: Settings, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read({"model": "m", "data": "x.jsonl"} | changes)
    assert message in str(caught.value)
