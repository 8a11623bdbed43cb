"""Well-known models and GPUs: sizes compared with transformers' own count, plans for GPUs that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from mergeforge.cli import run_command
from mergeforge.errors import BudgetError, RecipeError
from mergeforge.train.gpus import GIB, find_gpu
from mergeforge.train.known_models import KNOWN_MODELS, KnownModel
from mergeforge.train.model_stats import model_stats
from mergeforge.train.plan import make_plan
from mergeforge.train.run import train

TYPES = {
    "meta-llama/Llama-3.2-1B-Instruct": "llama",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2",
    "Qwen/Qwen3-0.6B": "qwen3",
    "google/gemma-2-2b-it": "gemma2",
    "google/gemma-3-1b-it": "gemma3_text",
    "allenai/OLMo-2-0425-1B-Instruct": "olmo2",
    "microsoft/Phi-3.5-mini-instruct": "phi3",
}


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.repo)
def test_the_sizes_give_the_number_of_parameters(known: KnownModel) -> None:
    """Two figures that were written down independently; neither was checked at the source."""
    assert known.stats().parameters == known.parameters


@pytest.mark.parametrize("repo", TYPES)
def test_the_sizes_are_those_that_transformers_counts(repo: str, tmp_path: Path) -> None:
    known = next(known for known in KNOWN_MODELS if known.repo == repo)
    config = AutoConfig.for_model(
        TYPES[repo],
        hidden_size=known.hidden,
        intermediate_size=known.intermediate,
        num_hidden_layers=known.layers,
        num_attention_heads=known.heads,
        num_key_value_heads=known.kv_heads,
        vocab_size=known.vocabulary,
        head_dim=known.head_dim or known.hidden // known.heads,
        tie_word_embeddings=known.tied,
        pad_token_id=0,
    )
    config.save_pretrained(tmp_path)
    counted, stats = model_stats(str(tmp_path)), known.stats()
    for name in ("parameters", "embedding", "head", "other_parameters", "hidden", "intermediate", "layers"):
        assert getattr(counted, name) == getattr(stats, name), name
    assert sum(module.numel for module in counted.linears) == sum(module.numel for module in stats.linears)


def test_a_7b_model_trains_on_8_gb_with_qlora_and_on_no_gpu_with_full_training() -> None:
    llama = next(known for known in KNOWN_MODELS if known.repo == "meta-llama/Llama-2-7b-chat-hf")
    gpu = llama.smallest_gpu("qlora")
    assert gpu is not None and gpu.memory == 8
    largest = KNOWN_MODELS[-1]
    assert largest.smallest_gpu("full") is None


def test_list_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["list", "models"]) == 0
    table = capsys.readouterr().out
    assert "Qwen/Qwen3-8B" in table and "apache-2.0" in table and "from memory in 2026-11, not checked" in table
    assert run_command(["list", "models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"parameters", "license", "memory", "smallest_gpu", "as_of", "source"} <= rows[0].keys()


@pytest.mark.parametrize("text", ["4090", "RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090", "4090 24GB"])
def test_a_gpu_has_several_spellings(text: str) -> None:
    assert find_gpu(text).label == "RTX 4090, 24 GB"


def test_a_size_takes_the_slowest_gpu_that_has_it() -> None:
    planned = find_gpu("8GB")
    assert planned.speed_of.name == "RTX 2070" and planned.usable < 8 * GIB
    assert find_gpu("100GB").speed_of.name == "H200" and find_gpu("1TB").speed_of.name == "B200"
    assert find_gpu("A100").speed_of.memory == 2 * find_gpu("a100-40gb").speed_of.memory


@pytest.mark.parametrize("text", ["4091", "8", "a lot", "10MB"])
def test_an_unknown_gpu_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="no GPU") as caught:
        find_gpu(text)
    assert caught.value.hint


def test_a_plan_for_a_gpu_that_is_not_here(settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    Path("train.yaml").write_text(yaml.safe_dump(settings))
    assert run_command(["train", "train.yaml", "--plan", "--gpu", "T4", "--price-per-hour", "0.5"]) == 0
    err = capfd.readouterr().err
    assert (
        "on T4, 16 GB" in err
        and "65 TFLOPS of the T4; not checked against its datasheet" in err
        and "at 0.5 an hour" in err
    )
    assert run_command(["train", "train.yaml", "--gpu", "T4"]) == 2
    plan = make_plan(settings, gpu="T4")
    assert plan.resolved.dtype == "fp16" and plan.resolved.device == "cuda"
    with pytest.raises(RecipeError, match="not for this machine"):
        train(plan)
    with pytest.raises(RecipeError, match="does not support bf16"):
        make_plan(settings | {"dtype": "bf16"}, gpu="T4")


def test_what_does_not_fit_the_gpu_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    known = next(known for known in KNOWN_MODELS if known.repo == "meta-llama/Llama-3.1-8B-Instruct")
    config = AutoConfig.for_model(
        "llama", hidden_size=known.hidden, intermediate_size=known.intermediate, vocab_size=known.vocabulary
    )
    large = tmp_path / "large"
    config.save_pretrained(large)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (large / name).write_bytes((Path(settings["model"]) / name).read_bytes())
    make_plan(settings | {"model": str(large), "method": "qlora"}, gpu="12GB")
    with pytest.raises(BudgetError, match="training needs about"):
        make_plan(settings | {"model": str(large), "method": "qlora"}, gpu="3GB")
