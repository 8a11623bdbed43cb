"""Sixteen adapters folded at once, in any order, compared with the float64 sum: one rounding, not sixteen."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergeforge
from mergeforge.operations.synthetic_models import ModelShape, write_adapter, write_model

SHAPE = ModelShape(hidden=192, intermediate=320, layers=2, heads=4, kv_heads=2, vocab=320)
COUNT = 16
ORDERS = [list(range(COUNT)), list(reversed(range(COUNT))), random.Random(0).sample(range(COUNT), COUNT)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_model(folder / "base", SHAPE, seed=0)
    for index in range(COUNT):
        write_adapter(folder / f"adapter-{index}", SHAPE, str(folder / "base"), rank=4, seed=index + 1)
    return folder


def exact_sums(models: Path) -> dict[str, Tensor]:
    """Every tensor in float64, computed from the files."""
    sums = {name: value.double() for name, value in load_file(models / "base" / "model.safetensors").items()}
    for index in range(COUNT):
        config = json.loads((models / f"adapter-{index}" / "adapter_config.json").read_text())
        factors = load_file(models / f"adapter-{index}" / "adapter_model.safetensors")
        for key, a in factors.items():
            if key.endswith(".lora_A.weight"):
                b = factors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                sums[name] += b.double() @ a.double() * (config["lora_alpha"] / config["r"])
    return sums


@pytest.mark.parametrize("order", ORDERS, ids=["forwards", "backwards", "mixed"])
def test_sixteen_adapters_are_rounded_once(models: Path, tmp_path: Path, order: list[int]) -> None:
    adapters = [str(models / f"adapter-{index}") for index in order]
    out = mergeforge.merge(base_model=str(models / "base"), adapters=adapters, out=tmp_path / "out")
    ours = load_file(out / "model.safetensors")
    exact = exact_sums(models)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        rounding = (exact[name].to(torch.bfloat16).double() - exact[name]).abs()
        error = (value.double() - exact[name]).abs()
        assert value.dtype == torch.bfloat16
        assert bool((error <= rounding + 1e-6 * exact[name].abs().max()).all()), name
