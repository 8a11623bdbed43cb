"""Adapters besides LoRA: trained, folded, and measured again."""

from __future__ import annotations

from typing import Any

import pytest
from support.training_runs import adapter_tensors, losses

from mergeforge.errors import RecipeError
from mergeforge.train.adapter_kinds import ADAPTER_KINDS
from mergeforge.train.plan import make_plan
from mergeforge.train.post_training import run_post_training
from mergeforge.train.run import train
from mergeforge.train.settings import read

Settings = dict[str, Any]
OPTIONS: dict[str, Settings] = {  # for widths of 64 and 176
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 16},
    "osf": {"effective_rank": 16},
    "psoft": {"r": 16},
    "pvera": {"r": 16},
    "shira": {"r": 8},
    "tinylora": {"u": 16},
    "fourierft": {"n_frequency": 64},
    "oft": {"oft_block_size": 8},
    "road": {"group_size": 16},
    "vblora": {"vector_length": 16, "num_vectors": 32},
    "vera": {"r": 16},
    "waveft": {"n_frequency": 64},
    "miss": {"r": 16},
    "randlora": {"r": 8},
}

OFTEN = ("boft", "ia3", "ln_tuning", "loha", "oft", "shira", "vera")  # the other kinds are tested with the slow tests


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, in SHiRA's forward pass
@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(ADAPTER_KINDS)]
)
def test_the_merged_model_has_the_adapters_loss(kind: str, settings: Settings) -> None:
    """The validation loss of the adapter after three steps, against that of the model it was folded into."""
    settings = {key: value for key, value in settings.items() if key != "lora"}
    adapter = {"type": kind, "options": OPTIONS.get(kind, {})}
    adapter |= {} if kind == "ln_tuning" else {"targets": ["q_proj", "down_proj"]}
    settings |= {"adapter": adapter, "lr": 1e-2, "warmup": 0, "dtype": "fp32"}
    plan = make_plan(settings | {"max_steps": 3, "val": 8, "after": {"merge": {"dtype": "float32"}}}, device="cpu")
    trained = train(plan)
    measured = run_post_training(plan, plan.settings.after).losses
    assert losses(trained)[-1] != pytest.approx(losses(trained)[0], rel=1e-6)
    assert measured["original"] == pytest.approx(measured["adapter"], rel=1e-5)


def test_layers_and_targets_are_kept(settings: Settings) -> None:
    settings = {key: value for key, value in settings.items() if key != "lora"}
    settings["adapter"] = {"type": "loha", "targets": ["q_proj", "v_proj"], "layers": [1], "options": {"r": 4}}
    trained = train(make_plan(settings | {"max_steps": 1}, device="cpu"))
    names = adapter_tensors(trained.folder.root)
    assert names and all(".layers.1." in name and ("q_proj" in name or "v_proj" in name) for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "loha"}, "16 or 32 bit"),
        ({"adapter": "loha", "method": "lora", "lora": {"r": 4}}, "remove 'lora'"),
        ({"adapter": "loha", "method": "lora", "tokens": {"add": ["<x>"]}}, "rows of new tokens"),
        ({"adapter": {"type": "loha", "options": {"r": [1]}}, "method": "lora"}, "must be a number"),
        ({"adapter": "prefix"}, "prefix"),
    ],
)
def test_settings_that_do_not_go_with_an_adapter_are_refused(changes: Settings, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read({"model": "m", "data": "x.jsonl"} | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"type": "loha", "options": {"rank": 4}}, "loha has no option 'rank'"),
        ({"type": "vera", "options": {"r": 0}}, "does not fit the model: float division by zero"),
        ({"type": "ia3", "layers": [0]}, "ia3 cannot be limited to layers"),
        (
            {"type": "ln_tuning", "targets": ["q_proj"]},
            "ln_tuning trains norms, and model.layers.0.self_attn.q_proj is none",
        ),
        ({"type": "boft", "options": {"boft_n_butterfly_factor": 2}}, "boft_n_butterfly_factor: 2 cannot be merged"),
        ({"type": "loha", "layers": [99]}, "adapter.layers: the model has no layer 99"),
        ({"type": "loha", "targets": ["qkv"]}, "adapter.targets: the model has no module 'qkv'"),
    ],
)
def test_an_adapter_that_peft_cannot_make_is_refused_by_the_plan(
    adapter: Settings, message: str, settings: Settings
) -> None:
    settings = {key: value for key, value in settings.items() if key != "lora"}
    with pytest.raises(RecipeError, match=message):
        make_plan(settings | {"adapter": adapter}, device="cpu")
