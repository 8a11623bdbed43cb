"""What `auto` resolves to, and the memory estimate against published figures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from mergeforge.cli.recipes import shipped_recipes
from mergeforge.errors import BudgetError
from mergeforge.train.auto_config import LengthStats, Machine, ResolvedSettings, resolve_settings
from mergeforge.train.estimate import estimate_memory
from mergeforge.train.model_stats import ModelStats, model_stats
from mergeforge.train.settings import LoraOptions, read
from mergeforge.train.training_setup import TrainingSetup

GB = 10**9
GPU = Machine("cuda:0", 8 * GB, "bf16")
ROWS = LengthStats(p95=700, p99=1000, longest=1800, rows=3000)
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 32768}
QWEN: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen2.5-3b": {
        **QWEN,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-14b": {
        **QWEN,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "qwen2.5-7b": {
        **QWEN,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}


@cache
def stats(name: str) -> ModelStats:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"vocab_size": 32000, **LLAMA, **MODELS[name]}))
        return model_stats(folder)


def resolve(name: str, machine: Machine = GPU, lengths: LengthStats = ROWS, **settings: Any) -> ResolvedSettings:
    return resolve_settings(read({"model": "m", "data": "d"} | settings), stats(name), lengths, machine)


def test_parameters_are_counted_without_weights() -> None:
    """Exactly the numbers of the models' cards."""
    parameters = {"llama-2-7b": 6738415616, "mistral-7b": 7241732096, "llama-3.1-8b": 8030261248}
    parameters |= {"qwen2.5-3b": 3085938688, "qwen2.5-7b": 7615616512, "qwen2.5-14b": 14770033664}
    assert {name: stats(name).parameters for name in parameters} == parameters
    assert stats("llama-2-7b").adapter_parameters(LoraOptions(r=16)) == 39976960


@pytest.mark.parametrize(
    ("tokens", "published"), [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)]
)
def test_the_estimate_matches_llama_factorys_table(tokens: int, published: int) -> None:
    """LLaMA 2 7B, QLoRA of rank 8, one sequence, all logits at once; GB as LLaMA-Factory's README gives them."""
    setup = TrainingSetup("qlora", LoraOptions(r=8), tokens, 1, "adamw", 2, ce_chunk=0, checkpointing=True)
    estimate = estimate_memory(stats("llama-2-7b"), setup).total / 2**30
    assert published * 0.9 <= estimate <= published * 1.15


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3.1-8b", "qwen2.5-7b"])
def test_a_7b_model_fits_into_eight_gigabytes(name: str) -> None:
    resolved = resolve(name, seq_len=1024)
    assert resolved.estimate.total <= GPU.memory
    assert resolved.setup.seq_len == 1024 and resolved.setup.lora.r == 16
    assert f"micro-batch of {resolved.setup.micro_batch}, with more gradient accumulation" in resolved.notes


def test_fallbacks_are_applied_in_order() -> None:
    resolved = [resolve("llama-3.1-8b", replace(GPU, memory=int(size * GB))) for size in (80, 24, 8, 6.5)]
    counts = [len(settings.notes) for settings in resolved]
    assert counts == sorted(counts)
    assert resolved[0].notes == () and resolved[0].setup.micro_batch == 8
    assert resolved[-1].setup.embed_on_cpu and resolved[-1].setup.optimizer == "paged_adamw_8bit"


def test_values_from_the_file_are_not_changed() -> None:
    options: dict[str, Any] = {"optimizer": "adamw", "batch": {"micro": 2}, "lora": {"r": 32}}
    setup = resolve("mistral-7b", **options, memory={"ce_chunk": 512}).setup
    assert (setup.optimizer, setup.micro_batch, setup.lora.r, setup.ce_chunk) == ("adamw", 2, 32, 512)


def test_too_little_memory_is_an_error_with_the_estimate_by_part() -> None:
    with pytest.raises(BudgetError, match=r"(?s)training needs about .* GB, but cuda:0 has 3.0 GB:.*activations"):
        resolve("llama-3.1-8b", replace(GPU, memory=3 * GB))


def test_learning_rate_and_epochs_depend_on_model_and_data() -> None:
    assert resolve("mistral-7b").lr == 2e-4 and resolve("mistral-7b").epochs == 3
    assert resolve("mistral-7b", lengths=replace(ROWS, rows=50_000)).epochs == 1
    assert resolve("mistral-7b", replace(GPU, memory=200 * GB), method="full").lr == 2e-5


def test_short_rows_are_packed_and_long_ones_are_not() -> None:
    assert resolve("mistral-7b", lengths=LengthStats(100, 150, 200, 1000)).pack
    assert not resolve("mistral-7b", lengths=LengthStats(1500, 1700, 1800, 1000)).pack


@pytest.mark.parametrize("version", ["0.1", "now"])
def test_a_resumed_run_keeps_the_settings_of_its_run_json(version: str) -> None:
    """run.json of version 0.1 has other names for some keys."""
    first, later = resolve("mistral-7b"), resolve("mistral-7b", replace(GPU, memory=80 * GB))
    assert first.setup != later.setup
    manifest = json.loads(json.dumps(asdict(first)))
    if version == "0.1":
        setup = manifest["way"] = manifest.pop("setup")
        for former, name in {"micro": "micro_batch", "width": "dtype_bytes", "on_card": "on_gpu"}.items():
            setup[former] = setup.pop(name)
    resumed = later.from_manifest(manifest, epochs=5)
    assert resumed.setup == first.setup and resumed.epochs == 5


@pytest.mark.parametrize("size", [6, 8, 12, 16, 24])
def test_shipped_settings_fit_their_gpu(size: int) -> None:
    settings = read(shipped_recipes()[f"train-{size}gb"])
    assert settings.memory.budget == size * GB
    name = settings.model.rpartition("/")[2].lower().removesuffix("-instruct")
    machine = Machine("cuda:0", int(size * GB * 0.93), "bf16")  # a GPU that a desktop uses too
    resolved = resolve_settings(settings, stats(name), ROWS, machine)
    assert resolved.setup.seq_len == settings.seq_len and resolved.setup.lora.r == settings.lora.r
