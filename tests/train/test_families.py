"""Model families: what an adapter learns on them is what its merge knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training_models import write_tiny
from support.training_runs import run

from mergeforge.operations.synthetic_models import write_tokenizer
from mergeforge.train.plan import make_plan
from mergeforge.train.post_training import run_post_training
from mergeforge.train.settings import MergeAfterTraining, PostTraining

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "qwen3": {},
    "gemma2": {},
    "gpt_neox": {},
    "bloom": {},
    "mamba": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,
}
APART = ("bloom", "mamba", "gpt_oss")  # ALiBi, a state, sinks: rows in one sequence would see each other


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_and_merge_have_one_loss(family: str, settings: dict[str, Any], here: Path) -> None:
    base = write_tiny(here, family, vocab_size=320, **FAMILIES[family])
    write_tokenizer(base)
    settings |= {"model": str(base), "val": 8, "pack": True, "seq_len": 128, "lora": {"r": 4}, "epochs": 4}
    notes: list[str] = []
    trained = run(settings, listeners=[lambda line: notes.append(line["note"]) if "note" in line else None])
    losses = trained.folder.metric_values("loss")
    assert losses[-1] < losses[0]
    assert any("does not keep packed rows apart" in note for note in notes) == (family in APART)
    plan = make_plan(settings, device="cpu")
    followed = run_post_training(plan, PostTraining(MergeAfterTraining(dtype="float32")))
    assert followed.losses["original"] == pytest.approx(followed.losses["adapter"], rel=1e-5)
    found = sum(one.numel() for one in adapter_of(trained.folder.adapter).values())
    planned = plan.stats.adapter_parameters(plan.resolved.setup.lora)
    assert found <= 1.15 * planned and (found >= 0.85 * planned or family == "gpt_oss")  # PEFT leaves its experts out


def adapter_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_nf4_that_cannot_be_told_leaves_the_merge_on_the_original(settings: dict[str, Any], here: Path) -> None:
    base = write_tiny(here, "gpt2", vocab_size=320)
    write_tokenizer(base)
    settings |= {"model": str(base), "val": 8, "method": "qlora"}
    run(settings)
    told: list[str] = []
    followed = run_post_training(
        make_plan(settings, device="cpu"), PostTraining(MergeAfterTraining()), tell=told.append
    )
    assert followed.base_numerics == "original" and followed.merged and (followed.merged / "mergeforge.json").is_file()
    assert "base_numerics" not in (here / "run" / "merge.yaml").read_text()


def test_fused_experts_have_a_rank_and_alpha_of_their_own(settings: dict[str, Any], here: Path) -> None:
    """PEFT doubles both for gate and up in one; with rank-stabilised LoRA their scale is another one."""
    base = write_tiny(here, "mixtral", vocab_size=320, **EXPERTS)
    write_tokenizer(base)
    settings |= {"model": str(base), "val": 8, "lora": {"r": 4, "rslora": True}}
    run(settings)
    followed = run_post_training(make_plan(settings, device="cpu"), PostTraining(MergeAfterTraining(dtype="float32")))
    assert followed.losses["original"] == pytest.approx(followed.losses["adapter"], rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "qwen3_moe"])
def test_qlora_and_its_merge_have_one_loss(family: str, settings: dict[str, Any], here: Path) -> None:
    """What bitsandbytes leaves in 16 bit (fused experts, routers) stays as it is in the merge too."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}  # whole blocks
    experts = {**EXPERTS, "moe_intermediate_size": 128}
    base = write_tiny(here, family, vocab_size=320, **wide, **(experts if family in FAMILIES else {}))
    write_tokenizer(base)
    settings |= {"model": str(base), "val": 8, "method": "qlora", "lora": {"r": 4}}
    run(settings)
    followed = run_post_training(
        make_plan(settings, device="cpu"),
        PostTraining(MergeAfterTraining(dtype="float32", base_numerics="dequant_nf4")),
    )
    assert followed.losses["dequant_nf4"] == pytest.approx(followed.losses["adapter"], abs=1e-3)
