"""GaLore and APOLLO: full training whose optimizer state has a low rank."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from support.training_models import write_tiny
from support.training_runs import interrupt_at, losses, run

from mergeforge.errors import MissingExtraError, RecipeError
from mergeforge.operations.synthetic_models import write_tokenizer
from mergeforge.train.low_rank import LOW_RANK_OPTIMIZERS
from mergeforge.train.plan import make_plan
from mergeforge.train.settings import read

Settings = dict[str, Any]
NAMES = sorted(LOW_RANK_OPTIMIZERS)


@pytest.fixture
def full(settings: Settings) -> Settings:
    """Settings of full training with projections to 8 dimensions, anew every 3 steps."""
    del settings["lora"]
    options = {"rank": 8, "update_proj_gap": 3, "scale": 1.0}
    return settings | {"method": "full", "optimizer_options": options, "save": {"every": 4}, "lr": 1e-3}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_bit_for_bit_and_both_loops_agree(name: str, full: Settings) -> None:
    pytest.importorskip(LOW_RANK_OPTIMIZERS[name].module)
    whole = run(full, optimizer=name)
    assert losses(whole)[-1] < losses(whole)[0]
    interrupted = run(full, optimizer=name, listeners=[interrupt_at(4)], output="interrupted")
    assert interrupted.interrupted
    state = torch.load(
        interrupted.folder.checkpoint(interrupted.folder.steps()[-1]) / "optimizer.pt", weights_only=False
    )
    ranks = [min(entry["exp_avg"].shape) for entry in state["state"].values() if "projector" in entry]
    assert ranks and set(ranks) == {8}
    resumed = run(full, optimizer=name, output="interrupted")
    assert losses(resumed) == losses(whole)
    models = [(trained.folder.model / "model.safetensors").read_bytes() for trained in (whole, resumed)]
    assert models[0] == models[1]
    assert losses(run(full, optimizer=name, loop="simple", output="simple")) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_applied(name: str, full: Settings) -> None:
    """transformers does not give it to these optimizers."""
    pytest.importorskip(LOW_RANK_OPTIMIZERS[name].module)
    plain, decayed = (run(full, optimizer=name, weight_decay=decay, output=str(decay)) for decay in (0, 10))
    assert losses(plain)[-1] != losses(decayed)[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_has_less_optimizer_state(name: str, full: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LOW_RANK_OPTIMIZERS[name].module, sys)
    part = "trained weights, gradients, optimizer"
    adam = make_plan({**full, "optimizer": "adamw", "optimizer_options": {}}, device="cpu")
    assert (
        make_plan(full | {"optimizer": name}, device="cpu").resolved.estimate.parts[part]
        < adam.resolved.estimate.parts[part]
    )


def test_models_without_linear_modules_are_refused(full: Settings, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", sys)
    folder = write_tiny(here, "gpt2", vocab_size=320)
    write_tokenizer(folder)
    with pytest.raises(RecipeError, match="takes torch's Linear modules, and this model has none"):
        make_plan(full | {"model": str(folder), "optimizer": "galore_adamw"}, device="cpu")


def test_a_missing_package_is_named(full: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(MissingExtraError, match="optimizer: galore_adamw needs galore-torch"):
        make_plan(full | {"optimizer": "galore_adamw"}, device="cpu")


def test_transformers_options_are_read() -> None:
    settings = {
        "model": "m",
        "data": "d",
        "method": "full",
        "optim": "galore_adamw",
        "optim_args": "rank=64, scale=0.1",
    }
    assert read(settings).optimizer_options == {"rank": 64, "scale": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora", "optimizer": "galore_adamw"}, "the state of an adapter is small"),
        ({"method": "full", "optimizer_options": {"rank": 8}}, "optimizer: adamw takes no options"),
        ({"method": "full", "optimizer": "galore_adamw", "optimizer_options": {"ranks": 8}}, "no option 'ranks'"),
        ({"method": "full", "optimizer": "apollo_adamw", "optimizer_options": {"rank": 0}}, "at least 1, not 0"),
        ({"method": "full", "optimizer": "apollo_adamw", "optimizer_options": [1]}, "must be a mapping of numbers"),
    ],
)
def test_settings_that_do_not_go_with_the_optimizer_are_refused(changes: Settings, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read({"model": "m", "data": "x.jsonl"} | changes)
