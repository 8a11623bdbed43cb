"""What `auto` becomes, and the memory formula against published figures."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from mergeforge.cli.recipes import shipped
from mergeforge.errors import BudgetError
from mergeforge.train.auto_config import LengthStats, Machine, ResolvedSettings, resolve_settings
from mergeforge.train.memory_estimate import TrainingSetup, estimate_memory
from mergeforge.train.model_stats import ModelStats, model_stats
from mergeforge.train.settings import LoraOptions, read

GB = 10**9
CARD = Machine("cuda:0", 8 * GB, "bf16")
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
def facts(name: str) -> ModelStats:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"vocab_size": 32000, **LLAMA, **MODELS[name]}))
        return model_stats(folder)


def chosen(name: str, machine: Machine = CARD, lengths: LengthStats = ROWS, **settings: Any) -> ResolvedSettings:
    return resolve_settings(read({"model": "m", "data": "d"} | settings), facts(name), lengths, machine)


def test_parameters_are_counted_without_weights() -> None:
    """As the models' cards give them, exactly."""
    wanted = {"llama-2-7b": 6738415616, "mistral-7b": 7241732096, "llama-3.1-8b": 8030261248}
    wanted |= {"qwen2.5-3b": 3085938688, "qwen2.5-7b": 7615616512, "qwen2.5-14b": 14770033664}
    assert {name: facts(name).parameters for name in wanted} == wanted
    assert facts("llama-2-7b").adapter_parameters(LoraOptions(r=16)) == 39976960


@pytest.mark.parametrize(
    ("tokens", "published"), [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)]
)
def test_the_estimate_against_llama_factorys_table(tokens: int, published: int) -> None:
    """LLaMA 2 7B, QLoRA of rank 8, one sequence, all logits held; GB as its README gives them."""
    way = TrainingSetup("qlora", LoraOptions(r=8), tokens, 1, "adamw", 2, ce_chunk=0, checkpointing=True)
    found = estimate_memory(facts("llama-2-7b"), way).total / 2**30
    assert published * 0.9 <= found <= published * 1.15


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3.1-8b", "qwen2.5-7b"])
def test_eight_gigabytes_hold_a_7b(name: str) -> None:
    found = chosen(name, seq_len=1024)
    assert found.estimate.total <= CARD.memory and found.setup.seq_len == 1024 and found.setup.lora.r == 16
    assert f"{found.setup.micro_batch} sequence(s) a pass, with more passes for a step" in found.notes


def test_things_are_given_up_in_order() -> None:
    sizes = [80, 24, 8, 6.5]
    found = [chosen("llama-3.1-8b", replace(CARD, memory=int(size * GB))) for size in sizes]
    assert [len(one.notes) for one in found] == sorted(len(one.notes) for one in found)
    assert found[0].notes == () and found[0].setup.micro_batch == 8
    assert found[-1].setup.embed_on_cpu and found[-1].setup.optimizer == "paged_adamw_8bit"


def test_what_the_file_sets_stays() -> None:
    found = chosen("mistral-7b", optimizer="adamw", batch={"micro": 2}, lora={"r": 32}, memory={"ce_chunk": 512})
    assert (found.setup.optimizer, found.setup.micro_batch, found.setup.lora.r, found.setup.ce_chunk) == (
        "adamw",
        2,
        32,
        512,
    )


def test_too_little_memory_is_an_error_by_part() -> None:
    with pytest.raises(BudgetError, match=r"(?s)training takes about .* GB, and cuda:0 has 3.0 GB:.*activations"):
        chosen("llama-3.1-8b", replace(CARD, memory=3 * GB))


def test_rates_and_epochs_follow_model_and_data() -> None:
    assert chosen("mistral-7b").lr == 2e-4 and chosen("mistral-7b").epochs == 3
    assert chosen("mistral-7b", lengths=replace(ROWS, rows=50_000)).epochs == 1
    assert chosen("mistral-7b", replace(CARD, memory=200 * GB), method="full").lr == 2e-5


def test_short_rows_are_packed_and_long_ones_are_not() -> None:
    assert chosen("mistral-7b", lengths=LengthStats(100, 150, 200, 1000)).pack
    assert not chosen("mistral-7b", lengths=LengthStats(1500, 1700, 1800, 1000)).pack


@pytest.mark.parametrize("size", [6, 8, 12, 16, 24])
def test_shipped_settings_fit_their_card(size: int) -> None:
    settings = read(shipped()[f"train-{size}gb"])
    assert settings.memory.budget == size * GB
    name = settings.model.rpartition("/")[2].lower().removesuffix("-instruct")
    machine = Machine("cuda:0", int(size * GB * 0.93), "bf16")  # of such a card that a desktop uses too
    found = resolve_settings(settings, facts(name), ROWS, machine)
    assert found.setup.seq_len == settings.seq_len and found.setup.lora.r == settings.lora.r
