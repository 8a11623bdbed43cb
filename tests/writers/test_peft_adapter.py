"""output.adapter in a recipe: the adapters as one, alone or beside the model that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergeforge
from mergeforge.cli import run_command
from mergeforge.errors import MergeforgeError, OutputError
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

MODELS = {"models": ["base"], "merge_method": "passthrough"}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", SHAPES["tiny"], seed=0, dtype="F32")
    for seed, rank in enumerate((2, 3), 1):
        write_adapter(tmp_path / f"a{seed}", SHAPES["tiny"], str(tmp_path / "base"), rank=rank, seed=seed)
    return tmp_path


def recipe(adapter: Any, **output: Any) -> dict[str, Any]:
    adapters = [{"adapter": "a1", "weight": 0.7}, {"adapter": "a2", "weight": -0.4}]
    return {"base_model": "base", "adapters": adapters, "output": {"adapter": adapter, **output}}


def folded(adapter: str) -> dict[str, torch.Tensor]:
    out = mergeforge.merge(base_model="base", adapters=[adapter], out=f"folded {Path(adapter).name}")
    return load_file(out / "model.safetensors")


def test_alone_it_folds_to_what_the_recipe_folds_to(models: Path) -> None:
    out = mergeforge.merge(recipe(True, safetensors=False), out="joined")
    names = {path.name for path in out.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "mergeforge.json"}
    assert not list(out.glob("model*"))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 5
    plain = {key: value for key, value in recipe(True).items() if key != "output"}
    wanted = load_file(mergeforge.merge(plain, out="wanted") / "model.safetensors")
    for name, value in folded("joined").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)
    assert run_command(["verify", "joined"]) == 0


def test_beside_the_model_it_lies_in_a_folder_of_its_own(models: Path) -> None:
    out = mergeforge.merge(recipe({"rank": 3, "dtype": "bfloat16"}), out="both")
    held = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.bfloat16}
    assert {min(value.shape) for value in held.values()} == {3}
    wanted, base = load_file(out / "model.safetensors"), load_file(models / "base" / "model.safetensors")
    for name, value in folded("both/adapter").items():
        apart, moved = (value - wanted[name]).norm(), (wanted[name] - base[name]).norm()
        assert float(apart) <= 0.7 * float(moved)
    assert run_command(["verify", "both"]) == 0
    (out / "adapter" / "adapter_config.json").write_text("{}")
    assert run_command(["verify", "both"]) == 3


def test_the_same_recipe_again(models: Path) -> None:
    out = mergeforge.merge(recipe(True, safetensors=False), out="joined")
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError):
        mergeforge.merge(recipe(True, safetensors=False), out="joined")
    mergeforge.merge(recipe(True, safetensors=False), out="joined", overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert not (out / ".mergeforge").exists()


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"output": {"adapter": {"rank": 0}}}, "at least 1, not 0"),
        ({"output": {"adapter": {"energy": 2}}}, "'energy' must be in"),
        ({"adapters": None, **MODELS}, "no adapters to combine"),
        ({"merge_method": "ties", "parameters": {"density": 0.5}}, "more than the base plus weighted adapters"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "slerp has no parameter 'weight'"),
    ],
)
def test_what_can_be_joined(models: Path, change: dict[str, Any], problem: str) -> None:
    asked = recipe(True, safetensors=False) | change
    asked = {key: value for key, value in asked.items() if value is not None}
    with pytest.raises(MergeforgeError, match=problem):
        mergeforge.plan(asked, out="joined")
    assert not Path("joined").exists()


def test_a_mean_of_adapters_is_an_adapter(models: Path) -> None:
    asked = {"base_model": "base", "adapters": ["a1", "a2"], "merge_method": "linear"}
    asked |= {"output": {"adapter": True, "safetensors": False}}
    mergeforge.merge(asked, out="mean")
    wanted = load_file(mergeforge.merge(asked | {"output": {}}, out="wanted") / "model.safetensors")
    for name, value in folded("mean").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


def test_the_plan_says_it(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "base_model: base\nadapters: [a1, a2]\noutput: {path: joined, safetensors: false, adapter: {rank: 2}}\n"
    Path("recipe.yaml").write_text(text)
    assert run_command(["plan", "recipe.yaml"]) == 0
    assert "adapter" in capsys.readouterr().out
