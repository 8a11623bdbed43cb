"""The Python interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mergeforge


def weights_of(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def test_parts_and_recipe_give_the_same_bytes(models: Path) -> None:
    recipe = {"base_model": "base", "adapters": [{"adapter": f"adapters/{name}", "weight": 0.5} for name in "ab"]}
    mergeforge.merge(recipe, out="one")
    mergeforge.merge(base_model="base", adapters=["adapters/a", "adapters/b"], weights=np.array([0.5, 0.5]), out="two")
    assert weights_of("one") == weights_of("two")


@pytest.mark.parametrize(("method", "parameters"), [("slerp", {"t": 0.5}), ("linear", {}), ("ties", {"density": 0.5})])
def test_parts_without_weights_work_for_every_kind_of_method(
    method: str, parameters: dict[str, float], models: Path
) -> None:
    inputs = ["tuned-a"] if method == "slerp" else ["tuned-a", "tuned-b"]
    out = mergeforge.merge(base_model="base", models=inputs, method=method, parameters=parameters, out="out")
    assert mergeforge.verify(out, deep=True).ok


def test_weights_must_match_and_recipe_excludes_parts(models: Path) -> None:
    with pytest.raises(mergeforge.RecipeError, match="1 weights for 0 models and 2 adapters"):
        mergeforge.merge(base_model="base", adapters=["adapters/a", "adapters/b"], weights=[1], out="out")
    with pytest.raises(mergeforge.RecipeError, match="not both"):
        mergeforge.merge({"base_model": "base"}, method="linear", out="out")


def test_a_plan_is_run_tile_by_tile(models: Path) -> None:
    plan = mergeforge.plan({"base_model": "base", "adapters": ["adapters/a"]}, out="out", memory="64MiB")
    assert {tile.name for tile in mergeforge.run(plan)} == {piece.info.name for piece in plan.pieces}


def test_torch_keeps_its_number_of_threads(models: Path) -> None:
    import torch

    before = torch.get_num_threads()
    mergeforge.merge(base_model="base", adapters=["adapters/a"], out="out")
    assert torch.get_num_threads() == before


def test_public_names_load_on_first_use() -> None:
    assert all(getattr(mergeforge, name) for name in mergeforge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mergeforge.nothing
