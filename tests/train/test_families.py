"""Model families: an adapter trained on each has the same validation loss before and after its merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training_models import write_tiny
from support.training_runs import adapter_tensors, losses, run

from mergeforge.operations.synthetic_models import write_tokenizer
from mergeforge.train.plan import make_plan
from mergeforge.train.post_training import PostTrainingResult, run_post_training
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
UNPACKED = ("bloom", "mamba", "gpt_oss")  # ALiBi, a state, sinks: rows in one sequence would influence each other


def write_base(folder: Path, family: str, **config: Any) -> str:
    base = write_tiny(folder, family, vocab_size=320, **config)
    write_tokenizer(base)
    return str(base)


def merge(settings: dict[str, Any], **options: Any) -> PostTrainingResult:
    return run_post_training(make_plan(settings, device="cpu"), PostTraining(MergeAfterTraining(**options)))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_and_merged_model_have_the_same_loss(family: str, settings: dict[str, Any], here: Path) -> None:
    settings |= {"model": write_base(here, family, **FAMILIES[family])}
    settings |= {"val": 8, "pack": True, "seq_len": 128, "lora": {"r": 4}, "epochs": 4}
    notes: list[str] = []
    trained = run(settings, listeners=[lambda line: notes.append(line["note"]) if "note" in line else None])
    assert losses(trained)[-1] < losses(trained)[0]
    assert any("cannot keep packed rows apart" in note for note in notes) == (family in UNPACKED)
    result = merge(settings, dtype="float32")
    assert result.losses["original"] == pytest.approx(result.losses["adapter"], rel=1e-5)
    numel = sum(tensor.numel() for tensor in adapter_tensors(trained.folder.root).values())
    plan = make_plan(settings, device="cpu")
    planned = plan.stats.adapter_parameters(plan.resolved.setup.lora)
    assert numel <= 1.15 * planned and (numel >= 0.85 * planned or family == "gpt_oss")  # PEFT skips its experts


def test_without_a_reproducible_nf4_form_the_merge_stays_on_the_original(settings: dict[str, Any], here: Path) -> None:
    settings |= {"model": write_base(here, "gpt2"), "val": 8, "method": "qlora"}
    run(settings)
    result = merge(settings)
    assert result.base_numerics == "original" and result.merged and (result.merged / "mergeforge.json").is_file()
    assert "base_numerics" not in (here / "run" / "merge.yaml").read_text()


def test_fused_experts_have_their_own_rank_and_alpha(settings: dict[str, Any], here: Path) -> None:
    """PEFT doubles both for gate and up fused into one; with rank-stabilized LoRA this changes the scale."""
    settings |= {"model": write_base(here, "mixtral", **EXPERTS), "val": 8, "lora": {"r": 4, "rslora": True}}
    run(settings)
    result = merge(settings, dtype="float32")
    assert result.losses["original"] == pytest.approx(result.losses["adapter"], rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "qwen3_moe"])
def test_qlora_adapter_and_merged_model_have_the_same_loss(family: str, settings: dict[str, Any], here: Path) -> None:
    """What bitsandbytes leaves in 16 bit (fused experts, routers) is not quantized in the merge either."""
    config = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}  # whole blocks
    config |= {**FAMILIES[family], "moe_intermediate_size": 128} if FAMILIES[family] else {}
    settings |= {"model": write_base(here, family, **config), "val": 8, "method": "qlora", "lora": {"r": 4}}
    run(settings)
    result = merge(settings, dtype="float32", base_numerics="dequant_nf4")
    assert result.losses["dequant_nf4"] == pytest.approx(result.losses["adapter"], abs=1e-3)
