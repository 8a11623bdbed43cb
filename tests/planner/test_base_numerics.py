"""base_numerics: an adapter that QLoRA trained goes into what it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergeforge
from mergeforge.errors import RecipeError
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

NAME = "model.layers.1.self_attn.q_proj.weight"
# The sixteen numbers of NF4 (QLoRA, https://arxiv.org/abs/2305.14314, appendix E).
LOW = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
MIDDLE = (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
HIGH = (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
CODE = torch.tensor([*LOW, *MIDDLE, *HIGH])


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Each block of 64 as its largest magnitude times the nearest of sixteen numbers."""
    blocks = weight.float().view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest).unsqueeze(-1).sub(CODE).abs().argmin(-1)
    return (CODE[nearest] * largest).view(weight.shape).to(weight.dtype)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", SHAPES["tiny"], seed=0)
    write_adapter(tmp_path / "legal", SHAPES["tiny"], str(tmp_path / "base"), rank=4, seed=1)
    return tmp_path


@pytest.mark.parametrize("where", ["adapters", "model"])
def test_the_change_is_added_to_what_nf4_holds(models: Path, where: str) -> None:
    recipe = (
        {"base_model": "base", "adapters": ["legal"]}
        if where == "adapters"
        else {"merge_method": "passthrough", "models": [{"model": "base", "adapters": ["legal"]}]}
    )
    plain = load_file(mergeforge.merge(recipe | {"dtype": "float32"}, out="plain") / "model.safetensors")
    out = mergeforge.merge(recipe | {"dtype": "float32", "base_numerics": "dequant_nf4_single"}, out="nf4")
    merged, base = load_file(out / "model.safetensors"), load_file("base/model.safetensors")
    change = plain[NAME] - base[NAME].float()
    torch.testing.assert_close(merged[NAME], nf4(base[NAME]).float() + change, rtol=1e-5, atol=1e-6)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], plain[name])
    assert "taken as NF4 without double quantization" in (out / "mergeforge.json").read_text()


def test_what_no_adapter_changes_stays(models: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": ["base"], "base_numerics": "dequant_nf4"}
    out = mergeforge.merge(recipe, out="out")
    assert (out / "model.safetensors").read_bytes() == Path("base/model.safetensors").read_bytes()


def test_a_word_that_is_none(models: Path) -> None:
    with pytest.raises(RecipeError, match="'base_numerics' cannot be 'nf4'"):
        mergeforge.plan({"base_model": "base", "adapters": ["legal"], "base_numerics": "nf4"}, out="out")
