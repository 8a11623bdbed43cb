"""Configs as on the Hub, in both layouts, completed as transformers completes them."""

from __future__ import annotations

import copy
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from mergeforge.gguf.architectures.hf_config import with_hf_defaults
from mergeforge.gguf.architectures.hf_defaults import hf_defaults

TRANSFORMERS = "5.23"  # whose defaults defaults.py holds
SKIPPED = {"sliding_window", "tie_word_embeddings"}  # what they decide is compared with whole files
LONG = [1.0] * 48

HUB: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "Llama-2-7b": {"model_type": "llama", "num_key_value_heads": None, "rope_scaling": None, "rms_norm_eps": 1e-05},
    "CodeLlama-7b": {"model_type": "llama", "rope_theta": 1000000, "vocab_size": 32016},
    "Yarn-Llama-2-7b": {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 16.0}},
    "Mistral-7B-v0.1": {"model_type": "mistral", "num_key_value_heads": 8, "rope_theta": 10000.0},
    "Mixtral-8x7B": {"model_type": "mixtral", "rope_theta": 1000000.0, "num_local_experts": 8},
    "Qwen2.5-7B": {"model_type": "qwen2", "rope_theta": 1000000.0, "num_key_value_heads": 4, "hidden_size": 3584},
    "Qwen2.5-yarn": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen3-30B-A3B": {"model_type": "qwen3_moe", "num_experts": 128, "head_dim": 128, "rope_scaling": None},
    "gemma-3-4b": {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "sliding_window_pattern": 6,
        "rope_scaling": None,
    },
    "Mistral-Small-3.1": {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "rope_theta": 1000000000.0},
    },
    "Ministral-3-8B": {"model_type": "mistral3", "text_config": {"model_type": "ministral3", "hidden_size": 4096}},
    "Phi-3-mini-128k": {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"long_factor": LONG[:48], "short_factor": LONG[:48], "type": "longrope"},
        "hidden_size": 3072,
    },
    "Phi-4-mini": {"model_type": "phi3", "partial_rotary_factor": 0.75, "hidden_size": 3072},
    "phi-2": {"model_type": "phi", "partial_rotary_factor": 0.4, "num_key_value_heads": None},
    "pythia": {"model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt2": {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024},
    "stablelm-2-1_6b": {"model_type": "stablelm", "partial_rotary_factor": 0.25, "rope_theta": 10000},
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
    },
    "DeepSeek-V3": {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "n_group": 8},
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "rope_theta": 150000},
    "OLMo-3": {"model_type": "olmo3", "rope_theta": 500000, "rope_scaling": None},
    "OLMo-2": {"model_type": "olmo2", "rope_theta": 500000},
    "falcon-7b": {"model_type": "falcon", "multi_query": True, "num_attention_heads": 71, "hidden_size": 4544},
    "c4ai-command-r": {"model_type": "cohere", "model_max_length": 131072, "rope_theta": 8000000.0},
    "command-r7b": {"model_type": "cohere2", "rope_theta": 50000, "sliding_window_pattern": 4, "hidden_size": 4096},
    "granite-3.1-8b": {"model_type": "granite", "rope_theta": 10000000.0, "attention_multiplier": 0.0078125},
    "SmolLM3-3B": {"model_type": "smollm3", "rope_theta": 5000000.0, "no_rope_layer_interval": 4},
    "Llama-4": {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_local_experts": 16}},
    "exaone-4": {"model_type": "exaone4", "sliding_window": 4096, "sliding_window_pattern": 4},
}


def of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The config as llama.cpp's converter gets it: all keys of its class, the text part at the root."""
    from support.quiet import quiet
    from transformers import AutoConfig

    options = copy.deepcopy(config)
    with quiet():
        whole = AutoConfig.for_model(options.pop("model_type"), **options).to_dict()
    return {**whole, **whole.get("text_config", {})}


@pytest.mark.parametrize("name", HUB)
def test_completed_as_transformers_does(name: str) -> None:
    """Every key that the table knows, head sizes, layer types and rope."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = "none"
    if not installed.startswith(TRANSFORMERS):
        pytest.skip(f"the table is of transformers {TRANSFORMERS}, installed: {installed}")
    wanted, found = of_transformers(HUB[name]), with_hf_defaults(HUB[name])
    kind = wanted["model_type"]
    for key in [*hf_defaults()[kind], "head_dim", "num_key_value_heads"]:
        if key in wanted and key not in SKIPPED:
            assert found.get(key) == wanted[key], key
    if found.get("layer_types") and wanted.get("layer_types"):
        assert found["layer_types"] == wanted["layer_types"]
    _same_rope(found["rope_parameters"], wanted.get("rope_parameters") or {})


def test_a_sliding_window_pattern_may_be_letters() -> None:
    """EXAONE 4's LLLG, which its transformers class cannot read, equals its 4."""
    told = {"model_type": "exaone4", "num_hidden_layers": 8}
    spelled, counted = (with_hf_defaults({**told, "sliding_window_pattern": one})["layer_types"] for one in ("LLLG", 4))
    assert spelled == counted == (["sliding_attention"] * 3 + ["full_attention"]) * 2


def _same_rope(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if isinstance(value, dict):
            _same_rope(found[key], value)
        elif key not in ("type", "max_position_embeddings"):
            assert found.get(key) == value, key
