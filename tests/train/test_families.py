"""Model families: an adapter trained on each has the same validation loss before and after its merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.training_models import EXPERTS, VISION_LANGUAGE, write_tiny, write_tiny_vision_language
from support.training_runs import adapter_tensors, losses, run

from mergeforge.errors import SourceError
from mergeforge.operations.synthetic_models import write_tokenizer
from mergeforge.train.plan import make_plan
from mergeforge.train.post_training import PostTrainingResult, run_post_training
from mergeforge.train.settings import MergeAfterTraining, PostTraining

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
JAMBA |= {"mamba_d_state": 8, "use_mamba_kernels": False}
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
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "deepseek_v3": EXPERTS | LATENT,
    "phimoe": EXPERTS,
    "jamba": EXPERTS | JAMBA,
    "cohere2": {},
}
NOT_TEXT = r"vision|visual|projector|connector|router|\.gate\.|expert_gate"
SLOW = pytest.mark.slow
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


VISION_LANGUAGE_CASES = [
    family if family in ("gemma3", "qwen3_vl_moe") else pytest.param(family, marks=SLOW)
    for family in VISION_LANGUAGE
    if family != "paligemma"
]


@pytest.mark.parametrize(
    "family", [*VISION_LANGUAGE_CASES, *(pytest.param(name, marks=SLOW) for name in MORE_FAMILIES)]
)
def test_only_the_text_part_is_trained_and_merges_with_the_same_loss(
    family: str, settings: dict[str, Any], here: Path
) -> None:
    """After three steps: merged loss against adapter loss, and no tower, projector or router in the adapter."""
    if family in VISION_LANGUAGE:
        base = write_tiny_vision_language(here, family, vocab_size=320)
        write_tokenizer(base)
    else:
        base = Path(write_base(here, family, **MORE_FAMILIES[family]))
    run(settings | {"model": str(base), "val": 8, "max_steps": 3})
    adapter = adapter_tensors(here / "run")
    assert not [name for name in adapter if re.search(NOT_TEXT, name)]
    assert not [name for name, tensor in adapter.items() if "lora_B" in name and not tensor.any()]  # each one is used
    result = merge(settings | {"model": str(base), "val": 8, "max_steps": 3}, dtype="float32")
    assert result.losses["original"] == pytest.approx(result.losses["adapter"], rel=1e-5)


def test_a_model_that_reads_ahead_is_refused(settings: dict[str, Any], here: Path) -> None:
    """PaliGemma's tokens attend to all others: its loss would fall although it learns nothing but to copy."""
    base = write_tiny_vision_language(here, "paligemma", vocab_size=320)
    write_tokenizer(base)
    with pytest.raises(SourceError, match="attend to later ones"):
        run(settings | {"model": str(base)})


def test_a_vision_tower_gets_an_adapter_when_it_is_named(settings: dict[str, Any], here: Path) -> None:
    """A plain module name means the text part's modules; a path or a regular expression can name the tower."""
    base = write_tiny_vision_language(here, "gemma3", vocab_size=320)
    write_tokenizer(base)
    settings |= {"model": str(base), "max_steps": 1}
    run(settings | {"lora": {"r": 4, "targets": ["q_proj"]}})
    assert not any("vision" in name for name in adapter_tensors(here / "run"))
    targets = r".*language_model.*\.v_proj|.*vision_tower.*\.q_proj"
    run(settings | {"lora": {"r": 4, "targets": targets}, "output": str(here / "named")})
    adapter = adapter_tensors(here / "named")
    modules = {("vision" in name, name.split(".lora_")[0].rpartition(".")[2]) for name in adapter}
    assert modules == {(False, "v_proj"), (True, "q_proj")}


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
