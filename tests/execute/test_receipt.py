"""What the receipt tells of every tensor: who changed it, how strongly, how far it moved, what rounding swallowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergeforge
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", SHAPES["tiny"], seed=0)
    write_model(tmp_path / "tuned", SHAPES["tiny"], seed=1, near=0)
    write_adapter(tmp_path / "legal", SHAPES["tiny"], str(tmp_path / "base"), rank=4, seed=1)
    return tmp_path


def receipt(out: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((out / "mergeforge.json").read_text())["tensors"]
    return found


def test_an_adapters_part(models: Path) -> None:
    recipe = {"base_model": "base", "adapters": [{"adapter": "legal", "weight": 0.5}]}
    out = mergeforge.merge(recipe, out="merged")
    config = json.loads(Path("legal/adapter_config.json").read_text())
    term = {"kind": "LoRA", "weight": 0.5, "rank": 4, "scale": config["lora_alpha"] / 4, "adapter": "legal"}
    assert receipt(out)[NAME]["terms"] == [term]
    assert "terms" not in receipt(out)["model.norm.weight"]


def test_how_far_it_moved_and_what_rounding_swallowed(models: Path) -> None:
    """Small tensors are one block, of which the first eighth is looked at."""
    out = mergeforge.merge({"base_model": "base", "adapters": [{"adapter": "legal", "weight": 0.01}]}, out="merged")
    wide = mergeforge.merge(
        {"base_model": "base", "adapters": [{"adapter": "legal", "weight": 0.01}], "dtype": "float32"}, out="wide"
    )
    before, after, exact = (load_file(one / "model.safetensors")[NAME][:8].float() for one in (Path("base"), out, wide))
    facts = receipt(out)[NAME]["change"]
    assert isinstance(facts, dict)
    change = exact - before
    assert facts["elements_looked_at"] == change.numel()
    assert facts["relative"] == pytest.approx(float(change.norm() / before.norm()), rel=1e-4)
    assert facts["largest"] == pytest.approx(float(change.abs().max()), rel=1e-4)
    swallowed = (change != 0) & (after == before)
    assert 0.1 < facts["swallowed"] == pytest.approx(float(swallowed.sum() / (change != 0).sum()), abs=1e-3)


def test_merges_of_models_tell_it_too(models: Path) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["tuned"], "parameters": {"weight": 1}}
    out = mergeforge.merge(recipe, out="merged")
    before, after = (load_file(one / "model.safetensors")[NAME][:8].float() for one in (Path("base"), out))
    facts = receipt(out)[NAME]["change"]
    assert isinstance(facts, dict)
    assert facts["relative"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("memory", ["32MiB", "1GiB"])
def test_the_facts_do_not_depend_on_the_memory(models: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeforge.core import tensor_info

    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 256)
    recipe = {"base_model": "base", "adapters": ["legal"]}
    one = receipt(mergeforge.merge(recipe, out="one", memory=memory))
    other = receipt(mergeforge.merge(recipe, out="other", threads=1))
    for name, facts in one.items():
        change, same = facts.get("change"), other[name].get("change")
        assert (change is None) == (same is None)
        if isinstance(change, dict) and isinstance(same, dict):
            assert change == pytest.approx(same)
            assert torch.tensor(change["elements_looked_at"]) > 0
