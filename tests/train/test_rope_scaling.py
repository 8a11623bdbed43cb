"""Scaled rotary positions: from train.yaml through the adapter into the merged model and its GGUF file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_models import write_tiny
from support.training_runs import losses, run
from transformers import AutoConfig, AutoModelForCausalLM

from mergeforge.checkpoints.rope import RopeScaling, scale_positions
from mergeforge.core.messages import WarningText
from mergeforge.errors import RecipeError
from mergeforge.eval import open_model
from mergeforge.gguf.reader import read_gguf
from mergeforge.operations.synthetic_models import ModelShape, write_model, write_tokenizer
from mergeforge.planner import make_plan as plan_merge
from mergeforge.train.plan import TINY_STD, make_plan
from mergeforge.train.post_training import run_post_training
from mergeforge.train.run import train
from mergeforge.train.settings import read

Settings = dict[str, Any]
SHAPE = ModelShape(64, 176, 2, 4, 2, 320)
POSITIONS = 2048  # of the tiny base


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def write_float32(folder: Path) -> Path:
    """The tiny base of the other tests, but in float32."""
    write_model(folder, SHAPE, std=TINY_STD)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    return folder


def loss_without_scaling(folder: Path, plan: Any) -> float:
    """The loss of a model if its config.json did not scale positions."""
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None, "rope_parameters": None}))
    loss = loss_of(folder, plan)
    (folder / "config.json").write_text(json.dumps(config))
    return loss


def loss_of(folder: Path, plan: Any) -> float:
    """The loss of the validation rows, by the scoring of `mergeforge eval`."""
    scores = [score for _, score in open_model(str(folder), device="cpu").score_rows(list(plan.data.validation))]
    return sum(score.nll for score in scores) / sum(score.tokens for score in scores)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("linear", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        ("yarn", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": POSITIONS}),
        ("llama3", {}),
    ],
)
def test_adapter_merged_model_and_gguf_have_the_positions_of_the_training(
    kind: str, keys: Settings, settings: Settings
) -> None:
    """The validation losses of the adapter and of the merged model, and llama.cpp's keys."""
    settings |= {"model": str(write_float32(Path("base"))), "lr": 1e-2, "warmup": 0, "max_steps": 3, "val": 8}
    settings |= {"rope_scaling": {"type": kind, "factor": 4}, "dtype": "fp32", "eval": {"max_tokens": 1}}
    settings |= {"after": {"merge": True, "gguf": ["f32"]}}
    plan = make_plan(settings, device="cpu")
    trained = train(plan)
    assert losses(trained)[0] != pytest.approx(losses(run(settings, rope_scaling=None, output="plain"))[0], rel=1e-6)
    measured = run_post_training(plan, plan.settings.after)
    assert measured.merged and measured.losses["original"] == pytest.approx(measured.losses["adapter"], rel=1e-5)
    assert measured.losses["original"] != pytest.approx(loss_without_scaling(measured.merged, plan), rel=2e-5)
    assert loss_of(trained.folder.adapter, plan) == pytest.approx(measured.losses["adapter"], rel=1e-5)
    assert "AutoModelForCausalLM.from_pretrained(base, config=config)" in (trained.result / "README.md").read_text()
    for folder in (trained.folder.adapter, measured.merged):
        config = AutoConfig.from_pretrained(folder)
        assert config.rope_parameters["rope_type"] == kind and config.rope_parameters["factor"] == 4
        assert config.max_position_embeddings == 4 * POSITIONS
    header = read_gguf(measured.ggufs[0])
    found = {key: header.keys[key].value for key in keys}
    assert found == keys and header.keys["llama.context_length"].value == 4 * POSITIONS
    assert ("rope_freqs.weight" in header.tensors) == (kind == "llama3")


def test_full_training_writes_the_scaled_positions(settings: Settings) -> None:
    del settings["lora"]
    trained = run(settings, method="full", rope_scaling={"type": "yarn", "factor": 2}, max_steps=1)
    config = AutoConfig.from_pretrained(trained.folder.model)
    assert config.max_position_embeddings == 2 * POSITIONS and config.rope_parameters["rope_type"] == "yarn"


def test_a_longer_seq_len_gets_the_factor_that_it_needs(settings: Settings) -> None:
    plan = make_plan(settings | {"seq_len": 5000, "rope_scaling": "linear"}, device="cpu")
    assert plan.scaled_config and plan.scaled_config["max_position_embeddings"] == 3 * POSITIONS
    assert plan.resolved.setup.seq_len == 5000
    assert read({"model": "m", "data": "d", "rope_scaling": {"rope_type": "yarn", "factor": 2}}).rope_scaling == (
        read({"model": "m", "data": "d", "rope_scaling": {"type": "yarn", "factor": 2.0}}).rope_scaling
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_transformers_computes_the_scaled_positions(family: str, kind: str, tmp_path: Path) -> None:
    """The frequencies of full attention, against a config that transformers scales itself."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    folder = write_tiny(tmp_path, family, **layers)
    config = AutoConfig.from_pretrained(folder)
    scaling = RopeScaling(kind, 4)
    scaled = type(config).from_dict(scale_positions(read_config(folder), scaling, 256))
    nested = "full_attention" in config.rope_parameters
    target = config.rope_parameters["full_attention"] if nested else config.rope_parameters
    target.update(scaling.parameters(256))
    config.max_position_embeddings = 1024
    names = "full_attention_inv_freq" if nested else "inv_freq"
    ours, theirs = (getattr(AutoModelForCausalLM.from_config(one).model.rotary_emb, names) for one in (scaled, config))
    plain = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    assert torch.equal(ours, theirs) and not torch.equal(ours, getattr(plain, names))


def test_adapters_with_different_positions_are_warned_of(settings: Settings) -> None:
    scaled = run(settings, rope_scaling={"type": "linear", "factor": 2}, max_steps=1, output="scaled")
    plain = run(settings, max_steps=1, output="plain")
    adapters = [str(trained.folder.adapter) for trained in (plain, scaled)]
    plan = plan_merge({"base_model": settings["model"], "adapters": adapters, "output": {"path": "merged"}})
    assert plan.config and plan.config["max_position_embeddings"] == 2 * POSITIONS
    assert any(isinstance(note, WarningText) and "other positions" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"seq_len": 1000}, r"rope_scaling: \{type: yarn, factor: 4\}"),
        ("gpt2", {"seq_len": 1000}, "set seq_len: 256, or use a model with a longer context$"),
        ("gpt2", {"rope_scaling": "yarn", "seq_len": 1000}, "no rotary positions that can be scaled"),
        ("llama", {"rope_scaling": "yarn"}, "needs a factor or seq_len"),
        ("llama", {"rope_scaling": "yarn", "seq_len": 128}, "256 positions, which is enough for seq_len: 128"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}, "seq_len": 1000}, "maximum of 512 tokens"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "would depend on the rows beside it"),
    ],
)
def test_positions_that_cannot_be_scaled_are_refused(
    family: str, changes: Settings, message: str, settings: Settings, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path, family)
    write_tokenizer(folder)
    with pytest.raises(RecipeError) as caught:
        make_plan(settings | {"model": str(folder), "lora": {}} | changes, device="cpu")
    assert re.search(message, f"{caught.value} {caught.value.hint}"), caught.value
