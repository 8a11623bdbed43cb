"""output.fp8 in a recipe: stored as DeepSeek and Qwen store it, verified, resumed, and read back as a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergeforge
from mergeforge.cli import run_command
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError
from mergeforge.operations.synthetic_models import ModelShape, write_adapter, write_model
from mergeforge.planner.fp8 import quantization_config
from mergeforge.quant_codecs import fp8

SHAPE = ModelShape(hidden=192, intermediate=320, layers=2, heads=4, kv_heads=2, vocab=320)
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", SHAPE, seed=0)
    write_adapter(tmp_path / "legal", SHAPE, str(tmp_path / "base"), rank=4, seed=1)
    return tmp_path


RECIPE = {"base_model": "base", "adapters": ["legal"]}


def test_the_bits_equal_the_quantizers(models: Path) -> None:
    wide = load_file(mergeforge.merge(RECIPE | {"dtype": "float32"}, out="wide") / "model.safetensors")
    out = mergeforge.merge(RECIPE | {"output": {"fp8": True, "shard_size": 400_000}}, out="small")
    shards = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    held = {name: value for shard in shards for name, value in shard.items()}
    assert len(shards) > 1
    codes, scales = fp8.quantize(wide[NAME], 128, 128)
    assert torch.equal(held[NAME].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(held[f"{NAME}_scale_inv"], scales) and scales.shape == (3, 2)
    assert held["model.embed_tokens.weight"].dtype == held["model.norm.weight"].dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    assert config["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weights.keys() == held.keys()


def test_it_is_verified(models: Path) -> None:
    out = mergeforge.merge(RECIPE | {"output": {"fp8": True}}, out="small")
    assert run_command(["verify", "small", "--deep", "--all"]) == 0
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert run_command(["verify", "small"]) == 3


def test_it_is_read_back_as_a_base(models: Path) -> None:
    mergeforge.merge(RECIPE | {"output": {"fp8": True}}, out="small")
    wide = load_file(mergeforge.merge(RECIPE, out="wide") / "model.safetensors")
    recipe = {"merge_method": "passthrough", "models": ["small"]}
    out = mergeforge.merge(recipe, out="back")
    back = load_file(out / "model.safetensors")
    assert back.keys() == wide.keys() and "quantization_config" not in json.loads((out / "config.json").read_text())
    apart = (back[NAME].float() - wide[NAME].float()).norm() / wide[NAME].float().norm()
    assert 0.01 < float(apart) < 0.04


@pytest.mark.parametrize("memory", ["24MiB", "1GiB"])
def test_memory_does_not_change_the_bytes(models: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeforge.core import tensor_info

    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 4096)
    one = mergeforge.merge(RECIPE | {"output": {"fp8": True}}, out="one", memory=memory, threads=1)
    other = mergeforge.merge(RECIPE | {"output": {"fp8": True}}, out="other", threads=2)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_beside_gguf(models: Path) -> None:
    out = mergeforge.merge(RECIPE | {"output": {"fp8": True, "gguf": "q8_0"}}, out="both")
    assert list(out.glob("*.gguf")) and run_command(["verify", "both", "--deep"]) == 0


def test_embeddings_stay_wide_and_transposed_weights_are_refused() -> None:
    names = ("wpe", "shared", "embed_positions", "layers.0.mlp.gate", "layers.0.mlp.gate_proj")
    infos = {f"{name}.weight": TensorInfo(f"{name}.weight", "F32", (4, 4)) for name in names}
    config = quantization_config(infos, "t5")
    assert config["modules_to_not_convert"] == ["embed_positions", "layers.0.mlp.gate", "shared", "wpe"]
    with pytest.raises(SourceError, match="gpt2 stores its weights transposed"):
        quantization_config(infos, "gpt2")
