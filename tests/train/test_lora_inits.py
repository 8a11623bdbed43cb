"""Initializations of LoRA that need the training data (EVA) or the base's own weights (LoftQ)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from support.training_models import write_tiny
from support.training_runs import adapter_tensors, have_same_adapter, interrupt_at, losses, run

from mergeforge.errors import RecipeError
from mergeforge.operations.synthetic_models import ModelShape, write_model, write_tokenizer
from mergeforge.train.loop.setup import make_context
from mergeforge.train.plan import TINY_STD, make_plan
from mergeforge.train.post_training import run_post_training
from mergeforge.train.run import train
from mergeforge.train.settings import read

Settings = dict[str, Any]
EVA: Settings = {"lora": {"r": 4, "init": "eva"}, "dtype": "fp32"}


@pytest.mark.parametrize("pack", [False, True])
def test_eva_merges_with_the_adapters_loss(pack: bool, settings: Settings) -> None:
    """The validation loss of an adapter whose modules have different ranks, against that of the merged model."""
    changes = {"max_steps": 3, "val": 8, "after": {"merge": {"dtype": "float32"}}, "pack": pack, "seq_len": 128}
    plan = make_plan(settings | EVA | changes, device="cpu")
    trained = train(plan)
    ranks = {len(tensor) for name, tensor in adapter_tensors(trained.folder.root).items() if ".lora_A." in name}
    assert len(ranks) > 1, "EVA distributes the ranks"
    measured = run_post_training(plan, plan.settings.after).losses
    assert measured["original"] == pytest.approx(measured["adapter"], rel=1e-5)


def test_eva_starts_from_the_directions_of_the_inputs(settings: Settings) -> None:
    """A's rows of the first q_proj, against a singular value decomposition of its inputs at the trained tokens."""
    plan = make_plan(settings | EVA | {"batch": {"size": 40, "micro": 40}}, device="cpu")
    context, _ = make_context(plan)
    batch = context.collator()([context.train[index] for index in range(len(context.train))])
    inputs: list[torch.Tensor] = []
    module = context.base_model.model.layers[0].self_attn.q_proj
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    with torch.no_grad():
        context.base_model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    handle.remove()
    rows = inputs[0][batch["labels"] != -100]
    directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh
    found = module.lora_A["default"].weight[:2].detach()
    assert (directions[:2] * found).sum(1).abs().tolist() == pytest.approx([1, 1], abs=2e-2)
    assert not module.lora_B["default"].weight.any()


def test_a_run_with_eva_resumes_bit_for_bit(settings: Settings) -> None:
    changes: Settings = {**EVA, "save": {"every": 3}}
    whole = run(settings, **changes)
    interrupted = run(settings, listeners=[interrupt_at(4)], **changes, output="interrupted")
    assert interrupted.interrupted and interrupted.folder.eva.is_file()
    resumed = run(settings, **changes, output="interrupted")
    assert losses(resumed) == losses(whole) and have_same_adapter(whole, resumed)


def test_eva_works_on_a_4_bit_base_and_for_preferences(preferences: Settings) -> None:
    trained = run(preferences, lora={"r": 4, "init": "eva"}, method="qlora", max_steps=2)
    assert losses(trained)[0] == pytest.approx(0.6931, abs=1e-4), "the model begins as its base"


def test_loftq_begins_nearer_to_the_16_bit_base(settings: Settings, here: Path) -> None:
    """The distance of every adapted 4-bit weight from the base's own, with and without A and B."""
    base = write_model(here / "base", ModelShape(128, 384, 2, 4, 4, 320), std=TINY_STD)
    changes = {"model": str(base), "method": "qlora", "lora": {"r": 8, "init": "loftq"}}
    context, _ = make_context(make_plan(settings | changes, device="cpu"))
    weights = load_file(base / "model.safetensors")
    modules = [item for item in context.base_model.named_modules() if hasattr(item[1], "lora_A")]
    assert modules
    for name, module in modules:
        plain = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        own = weights[f"{name}.weight"].float()
        assert (plain + module.get_delta_weight("default") - own).norm() < 0.95 * (plain - own).norm(), name


def test_loftq_folds_into_the_4_bit_form(settings: Settings, here: Path) -> None:
    """The validation loss of the adapter on the NF4 base, against that of the merged model."""
    base = write_model(here / "base", ModelShape(128, 384, 2, 4, 4, 320), std=TINY_STD)
    changes = {"model": str(base), "method": "qlora", "lora": {"r": 8, "init": "loftq"}, "max_steps": 3, "val": 8}
    plan = make_plan(settings | changes | {"dtype": "fp32", "after": {"merge": {"dtype": "float32"}}}, device="cpu")
    train(plan)
    result = run_post_training(plan, plan.settings.after)
    assert result.base_numerics == "dequant_nf4"
    assert result.losses["dequant_nf4"] == pytest.approx(result.losses["adapter"], rel=1e-5)


def test_fused_experts_are_refused(settings: Settings, here: Path) -> None:
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = write_tiny(here, "qwen3_moe", vocab_size=320, **experts)
    write_tokenizer(folder)
    with pytest.raises(RecipeError, match="eva does not work on experts"):
        make_plan(settings | EVA | {"model": str(folder)}, device="cpu")


def test_loftq_needs_a_base_whose_4_bit_form_can_be_made_again(settings: Settings, here: Path) -> None:
    folder = write_tiny(here, "gpt2", vocab_size=320)
    write_tokenizer(folder)
    changes = {"model": str(folder), "method": "qlora", "lora": {"r": 4, "init": "loftq"}}
    with pytest.raises(RecipeError, match="cannot be made again from this model's files"):
        make_plan(settings | changes, device="cpu")


def test_eva_needs_enough_data(settings: Settings) -> None:
    lines = Path(settings["data"]).read_text().splitlines()
    Path(settings["data"]).write_text("\n".join(lines[:2]))
    with pytest.raises(RecipeError, match="needs 96 trained tokens"):
        make_context(make_plan(settings | {"lora": {"r": 48, "init": "eva"}}, device="cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora", "lora": {"init": "loftq"}}, "could not be folded into the original"),
        ({"method": "dora", "lora": {"init": "eva"}}, "DoRA's magnitudes"),
        ({"lora": {"init": "loftq"}, "after": {"merge": {"base_numerics": "original"}}}, "would count twice"),
        ({"objective": "dpo", "lora": {"init": "loftq"}}, "does not begin as its 4-bit base"),
    ],
)
def test_initializations_that_cannot_work_are_refused(changes: Settings, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read({"model": "m", "data": "x.jsonl"} | changes)
