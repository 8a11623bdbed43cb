"""Merges of a quantized tiny Llama, compared with the same merges of its dequantized version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_values import Tensors, write
from support.quantized_cases import FORMATS, into_bytes

import mergeforge
from mergeforge.core import tensor_info


@pytest.fixture
def pair(models: Path) -> Callable[[str], tuple[str, str]]:
    """Write the base model in a format and, by the formula of that format, in bf16; returns both folders."""

    def make(kind: str) -> tuple[str, str]:
        packed: Tensors = {}
        dense: Tensors = {}
        settings: dict[str, Any] = {}
        for name, value in load_file("base/model.safetensors").items():
            if not name.endswith("_proj.weight"):
                packed[name] = dense[name] = value
                continue
            stored, plain, settings = FORMATS[kind](value)
            packed |= {f"{name.removesuffix('weight')}{leaf}": part for leaf, part in stored.items()}
            dense[name] = plain.bfloat16()
        config = json.loads(Path("base/config.json").read_text())
        for folder in ("packed", "dense"):
            shutil.copytree("base", folder)
        write(Path("packed"), packed, config | {"quantization_config": settings})
        write(Path("dense"), dense, config)
        return "packed", "dense"

    return make


def merged(base: str, out: str, **options: Any) -> tuple[bytes, dict[str, Any]]:
    recipe = {"adapters": ["adapters/loan", "adapters/fraud"]} | options
    folder = mergeforge.merge(base_model=base, out=out, **recipe)
    return (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", FORMATS)
def test_adapters_on_a_quantized_base(kind: str, pair: Callable[[str], tuple[str, str]]) -> None:
    """The same bytes and config as on the dequantized base: no trace of the format is left."""
    packed, dense = pair(kind)
    assert merged(packed, "one") == merged(dense, "two")


@pytest.mark.parametrize("kind", ["nf4", "fp8 block", "gptq ordered", "awq", "packed"])
def test_bytes_do_not_depend_on_memory_or_threads(
    kind: str, pair: Callable[[str], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a few rows with little memory, and with two threads."""
    packed, dense = pair(kind)
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 3000)
    expected, _ = merged(dense, "one")
    assert merged(packed, "two", memory="16MiB", threads=1)[0] == expected
    assert merged(packed, "three", threads=2)[0] == expected


def test_task_vectors_from_a_quantized_base(pair: Callable[[str], tuple[str, str]]) -> None:
    """TIES collects statistics of whole tensors, so a staged base is computed more than once."""
    packed, dense = pair("gptq")
    recipe = {"models": ["tuned-a", "tuned-b"], "adapters": [], "method": "ties", "parameters": {"density": 0.5}}
    assert merged(packed, "one", **recipe) == merged(dense, "two", **recipe)


def test_the_plan_notes_what_it_dequantizes(pair: Callable[[str], tuple[str, str]]) -> None:
    packed, _ = pair("nf4")
    plan = mergeforge.plan({"base_model": packed, "adapters": ["adapters/loan"]}, out="out")
    assert f"{packed}: dequantized 28 tensors of bitsandbytes NF4" in plan.notes
    assert plan.nbytes_read < sum(info.nbytes for info in plan.tensors)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """The tensors have the names and shapes of a 16-bit gpt-oss, and transformers loads the output."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 32}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads)).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed = {}
    for name, value in plain.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = value
            continue
        codes = torch.arange(value.numel()).view(len(value), value.shape[2], -1, 32) * 7 % 16
        packed[f"{name}_blocks"] = into_bytes(codes, high_first=False)
        packed[f"{name}_scales"] = torch.full(codes.shape[:3], 120, dtype=torch.uint8)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    write(tmp_path / "packed", packed, config | {"quantization_config": {"quant_method": "mxfp4"}})
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "packed"), "parameters": {"weight": 1}}]}
    out = mergeforge.merge(recipe, out=tmp_path / "out")
    written = load_file(out / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }
    loaded, info = transformers.GptOssForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(
        loaded.state_dict()["model.layers.0.mlp.experts.down_proj"], written["model.layers.0.mlp.experts.down_proj"]
    )
