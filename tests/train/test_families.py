"""Model families: an adapter trained on each has the same validation loss before and after its merge."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.training_models import EXPERTS, TEXT_FAMILIES, VISION_LANGUAGE, write_tiny, write_tiny_vision_language
from support.training_runs import adapter_tensors, losses, run
from transformers import AutoConfig

from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval import evaluate
from mergeforge.operations.synthetic_models import write_tokenizer
from mergeforge.train.plan import make_plan
from mergeforge.train.post_training import PostTrainingResult, run_post_training
from mergeforge.train.settings import MergeAfterTraining, PostTraining

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
NOT_TEXT = r"vision|visual|audio|projector|connector|cross_attn|router|\.gate\.|expert_gate"
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
    assert 0.85 * planned <= numel <= 1.15 * planned


SHORT = ("gemma3n_text", "gemma4", "falcon_h1", "llama4", "mllama", "qwen3_vl_moe")  # not left to the slow tests
GGUF = (
    "gemma4_text",
    "llama4",
    "falcon_h1",
    "hunyuan_v1_moe",
    "olmoe",
    "qwen3_next",
    "gemma3",
    "llava",
)


def families(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: all but a few are slow."""
    return [name if name in SHORT else pytest.param(name, marks=SLOW) for name in names if name != "paligemma"]


def write_any(folder: Path, family: str) -> str:
    if family not in VISION_LANGUAGE:
        return write_base(folder, family, **TEXT_FAMILIES[family])
    base = write_tiny_vision_language(folder, family, vocab_size=320)
    write_tokenizer(base)
    return str(base)


@pytest.mark.parametrize("family", families([*VISION_LANGUAGE, *TEXT_FAMILIES]))
def test_only_the_text_part_is_trained_and_merges_with_the_same_loss(
    family: str, settings: dict[str, Any], here: Path
) -> None:
    """After three steps: merged loss against adapter loss, and no tower, projector or router in the adapter."""
    settings |= {"model": write_any(here, family), "val": 8, "max_steps": 3}
    run(settings)
    adapter = adapter_tensors(here / "run")
    assert not [name for name in adapter if re.search(NOT_TEXT, name)]
    assert not [name for name, tensor in adapter.items() if "lora_B" in name and not tensor.any()]  # each one is used
    result = merge(settings, dtype="float32")
    assert result.losses["original"] == pytest.approx(result.losses["adapter"], rel=1e-5)


@pytest.mark.parametrize("family", families(GGUF))
def test_a_gguf_of_the_text_part_has_the_loss_of_the_adapter(family: str, settings: dict[str, Any], here: Path) -> None:
    """In llama.cpp, whose 16-bit keys and values make the difference."""
    settings |= {"model": write_any(here, family), "val": 8, "max_steps": 3, "after": {"merge": True, "gguf": ["f32"]}}
    run(settings)
    plan = make_plan(settings, device="cpu")
    result = run_post_training(plan, plan.settings.after)
    assert plan.data.validation is not None
    assert evaluate(str(result.ggufs[0]), plan.data.validation).nll == pytest.approx(result.losses["adapter"], rel=3e-3)


def test_a_model_that_reads_ahead_is_refused_by_the_plan(settings: dict[str, Any], here: Path) -> None:
    """PaliGemma's tokens attend to all others: its loss would fall although it learns nothing but to copy."""
    with pytest.raises(SourceError, match="attend to later ones"):
        make_plan(settings | {"model": write_any(here, "paligemma")}, device="cpu")


def test_new_tokens_are_refused_where_the_head_has_no_rows_for_them(settings: dict[str, Any], here: Path) -> None:
    """The embedding of Llama 3.2 Vision has eight rows more than its head."""
    settings |= {"model": write_any(here, "mllama"), "tokens": {"add": ["<note>"]}}
    with pytest.raises(RecipeError, match="the head has 320 rows and the embedding 328"):
        make_plan(settings, device="cpu")


@pytest.mark.skipif(find_spec("timm") is not None, reason="needs an environment without timm")
def test_a_missing_package_of_a_vision_tower_is_named_by_the_plan(settings: dict[str, Any], here: Path) -> None:
    """Gemma 3n's tower is a timm model."""
    AutoConfig.for_model("gemma3n", architectures=["Gemma3nForConditionalGeneration"]).save_pretrained(here / "gemma3n")
    write_tokenizer(here / "gemma3n")
    with pytest.raises(SourceError, match="pip install"):
        make_plan(settings | {"model": str(here / "gemma3n")}, device="cpu")


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
