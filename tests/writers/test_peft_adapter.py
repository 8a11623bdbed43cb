"""output.adapter in a recipe: the combined adapter, alone or next to the merged model."""

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


def test_adapter_alone_folds_to_the_same_model_as_the_recipe(models: Path) -> None:
    out = mergeforge.merge(recipe(True, safetensors=False), out="combined")
    names = {path.name for path in out.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "mergeforge.json"}
    assert not list(out.glob("model*"))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 5
    plain = {key: value for key, value in recipe(True).items() if key != "output"}
    expected = load_file(mergeforge.merge(plain, out="expected") / "model.safetensors")
    for name, value in folded("combined").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert run_command(["verify", "combined"]) == 0


def test_adapter_next_to_the_model_is_in_its_own_folder(models: Path) -> None:
    out = mergeforge.merge(recipe({"rank": 3, "dtype": "bfloat16"}), out="both")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.bfloat16}
    assert {min(value.shape) for value in adapter.values()} == {3}
    expected, base = load_file(out / "model.safetensors"), load_file(models / "base" / "model.safetensors")
    for name, value in folded("both/adapter").items():
        error, change = (value - expected[name]).norm(), (expected[name] - base[name]).norm()
        assert float(error) <= 0.7 * float(change)
    assert run_command(["verify", "both"]) == 0
    (out / "adapter" / "adapter_config.json").write_text("{}")
    assert run_command(["verify", "both"]) == 3


def test_running_the_same_recipe_again(models: Path) -> None:
    out = mergeforge.merge(recipe(True, safetensors=False), out="combined")
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError):
        mergeforge.merge(recipe(True, safetensors=False), out="combined")
    mergeforge.merge(recipe(True, safetensors=False), out="combined", overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert not (out / ".mergeforge").exists()


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"output": {"adapter": {"rank": 0}}}, "at least 1, not 0"),
        ({"output": {"adapter": {"energy": 2}}}, "'energy' must be in"),
        ({"adapters": None, **MODELS}, "no adapters to combine"),
        ({"merge_method": "ties", "parameters": {"density": 0.5}}, "more than the base plus weighted adapters"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "more than the base plus weighted adapters"),
    ],
)
def test_errors_for_recipes_that_give_no_adapter(models: Path, change: dict[str, Any], problem: str) -> None:
    settings = recipe(True, safetensors=False) | change
    settings = {key: value for key, value in settings.items() if value is not None}
    with pytest.raises(MergeforgeError, match=problem):
        mergeforge.plan(settings, out="combined")
    assert not Path("combined").exists()


def test_mean_of_adapters_is_an_adapter(models: Path) -> None:
    settings = {"base_model": "base", "adapters": ["a1", "a2"], "merge_method": "linear"}
    settings |= {"output": {"adapter": True, "safetensors": False}}
    mergeforge.merge(settings, out="mean")
    expected = load_file(mergeforge.merge(settings | {"output": {}}, out="expected") / "model.safetensors")
    for name, value in folded("mean").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_plan_mentions_the_adapter(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "base_model: base\nadapters: [a1, a2]\noutput: {path: combined, safetensors: false, adapter: {rank: 2}}\n"
    Path("recipe.yaml").write_text(text)
    assert run_command(["plan", "recipe.yaml"]) == 0
    assert "adapter" in capsys.readouterr().out
