"""The receipt's entry of each tensor: which adapter changed it, how far it moved, what was lost to rounding."""

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
    tensors: dict[str, dict[str, object]] = json.loads((out / "mergeforge.json").read_text())["tensors"]
    return tensors


def test_records_the_terms_of_an_adapter(models: Path) -> None:
    recipe = {"base_model": "base", "adapters": [{"adapter": "legal", "weight": 0.5}]}
    out = mergeforge.merge(recipe, out="merged")
    config = json.loads(Path("legal/adapter_config.json").read_text())
    term = {"kind": "LoRA", "weight": 0.5, "rank": 4, "scale": config["lora_alpha"] / 4, "adapter": "legal"}
    assert receipt(out)[NAME]["terms"] == [term]
    assert "terms" not in receipt(out)["model.norm.weight"]


def test_records_the_change_and_what_was_lost_to_rounding(models: Path) -> None:
    """Small tensors are one block, of which the first eighth is measured."""
    out = mergeforge.merge({"base_model": "base", "adapters": [{"adapter": "legal", "weight": 0.01}]}, out="merged")
    wide = mergeforge.merge(
        {"base_model": "base", "adapters": [{"adapter": "legal", "weight": 0.01}], "dtype": "float32"}, out="wide"
    )
    before, after, exact = (
        load_file(folder / "model.safetensors")[NAME][:8].float() for folder in (Path("base"), out, wide)
    )
    recorded = receipt(out)[NAME]["change"]
    assert isinstance(recorded, dict)
    change = exact - before
    assert recorded["elements_sampled"] == change.numel()
    assert recorded["relative"] == pytest.approx(float(change.norm() / before.norm()), rel=1e-4)
    assert recorded["largest"] == pytest.approx(float(change.abs().max()), rel=1e-4)
    lost = (change != 0) & (after == before)
    assert 0.1 < recorded["lost_to_rounding"] == pytest.approx(float(lost.sum() / (change != 0).sum()), abs=1e-3)


def test_records_the_change_of_a_merge_of_models(models: Path) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["tuned"], "parameters": {"weight": 1}}
    out = mergeforge.merge(recipe, out="merged")
    before, after = (load_file(folder / "model.safetensors")[NAME][:8].float() for folder in (Path("base"), out))
    recorded = receipt(out)[NAME]["change"]
    assert isinstance(recorded, dict)
    assert recorded["relative"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("memory", ["32MiB", "1GiB"])
def test_change_stats_do_not_depend_on_the_memory(models: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeforge.core import tensor_info

    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 256)
    recipe = {"base_model": "base", "adapters": ["legal"]}
    limited = receipt(mergeforge.merge(recipe, out="one", memory=memory))
    unlimited = receipt(mergeforge.merge(recipe, out="other", threads=1))
    for name, entry in limited.items():
        change, expected = entry.get("change"), unlimited[name].get("change")
        assert (change is None) == (expected is None)
        if isinstance(change, dict) and isinstance(expected, dict):
            assert change == pytest.approx(expected)
            assert torch.tensor(change["elements_sampled"]) > 0
