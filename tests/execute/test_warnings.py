"""Warnings of a merge: before it runs, about its result, in the receipt, the card and verify, and with strict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import make_adapter

import mergeforge
from mergeforge.errors import SourceError
from mergeforge.operations.synthetic_models import ModelShape, write_model

SHAPE = ModelShape(hidden=32, intermediate=48, layers=1, heads=4, kv_heads=2, vocab=320)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warnings")
    write_model(root / "base", SHAPE, seed=1)
    make_adapter(root / "base", root / "adapter")
    return root


def scaled(root: Path, out: Path, factor: float) -> Path:
    """The adapter with every lora_B multiplied."""
    shutil.copytree(root / "adapter", out)
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(
        {name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()},
        out / "adapter_model.safetensors",
    )
    return out


def fold(root: Path, adapter: Path, **more: Any) -> dict[str, Any]:
    return {"base_model": str(root / "base"), "adapters": [str(adapter)], **more}


def test_an_adapter_of_zeros_is_a_warning_everywhere(root: Path, tmp_path: Path) -> None:
    recipe = fold(root, scaled(root, tmp_path / "untrained", 0.0))
    plan = mergeforge.plan(recipe, out=tmp_path / "out", device="cpu")
    assert any("changes nothing" in warning for warning in plan.warnings)
    result = mergeforge.run(plan)
    assert set(plan.warnings) < set(result.warnings)  # and every tensor equals the base's
    receipt = json.loads((tmp_path / "out" / "mergeforge.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert set(receipt["warnings"]) == set(result.warnings) == set(mergeforge.verify(tmp_path / "out").warnings)
    assert "## Warnings" in card and "changes nothing" in card


def test_a_weight_of_zero_is_a_warning(root: Path, tmp_path: Path) -> None:
    recipe = fold(root, root / "adapter", dtype="float32")
    recipe["adapters"] = [{"adapter": str(root / "adapter"), "weight": 0.0}]
    assert any("weight 0" in warning for warning in mergeforge.plan(recipe, out=tmp_path, device="cpu").warnings)


def test_changes_lost_to_rounding_are_a_warning(root: Path, tmp_path: Path) -> None:
    """A delta of a 10,000th of the weights is below the precision of bfloat16, and not below that of float32."""
    recipe = fold(root, scaled(root, tmp_path / "small", 1e-3))
    (warning,) = mergeforge.run(recipe | {"dtype": "bfloat16"}, out=tmp_path / "rounded", device="cpu").warnings
    assert "lost to rounding" in warning and "float32" in warning
    assert not mergeforge.run(recipe | {"dtype": "float32"}, out=tmp_path / "kept", device="cpu").warnings


def test_strict_keeps_the_work_but_not_the_result(root: Path, tmp_path: Path) -> None:
    """A warning about the result comes at the end: nothing is published, and a run without strict resumes."""
    recipe = fold(root, scaled(root, tmp_path / "small", 1e-3), dtype="bfloat16")
    with pytest.raises(SourceError, match="lost to rounding"):
        mergeforge.run(recipe, out=tmp_path / "out", device="cpu", strict=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    tiles = list(mergeforge.iter_run(recipe, out=tmp_path / "out", device="cpu"))
    assert tiles and (tmp_path / "out" / "model.safetensors").exists()


def test_models_of_other_dtypes_are_a_warning_unless_the_recipe_says_the_dtype(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    save_file({name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}, weights)
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (root / "base", tmp_path / "half")]
    recipe = {"merge_method": "linear", "models": models}
    (warning,) = mergeforge.plan(recipe, out=tmp_path / "out", device="cpu").warnings
    assert "float16" in warning
    assert not mergeforge.plan(recipe | {"dtype": "bfloat16"}, out=tmp_path / "out", device="cpu").warnings


def test_a_model_without_tokenizer_is_a_warning(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    recipe = {"base_model": str(tmp_path / "bare"), "adapters": [str(root / "adapter")]}
    (warning,) = mergeforge.plan(recipe, out=tmp_path / "out", device="cpu").warnings
    assert "no tokenizer" in warning


def test_replacing_an_edited_card_is_a_warning(root: Path, tmp_path: Path) -> None:
    recipe, messages = fold(root, root / "adapter"), list[str]()
    out = mergeforge.run(recipe, out=tmp_path / "out", device="cpu").folder
    mergeforge.run(recipe, out=out, device="cpu", overwrite=True, on_message=messages.append)
    assert not messages
    (out / "README.md").write_text("what I wrote")
    with pytest.raises(SourceError, match=r"README\.md was edited"):
        mergeforge.run(recipe, out=out, device="cpu", overwrite=True, strict=True)
    mergeforge.run(recipe, out=out, device="cpu", overwrite=True, on_message=messages.append)
    assert len(messages) == 1 and "README.md was edited" in messages[0]
