"""Merges of models that store the same weights under other names, against the mean of their state dicts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.other_names import dump, other_names
from support.quiet import quiet
from support.tiny_architectures import ARCHITECTURES, Architecture

import mergeforge
from mergeforge import SourceError

QUICK = ("llama", "gpt2", "bert", "mixtral", "llava", "gemma3", "marian", "bloom")
CASES = [pytest.param(one, id=one.kind, marks=[] if one.kind in QUICK else [pytest.mark.slow]) for one in ARCHITECTURES]


def merged(case: Architecture, folders: list[Path], out: Path) -> dict[str, torch.Tensor]:
    """The state dict that transformers loads from the mean of the folders; it misses nothing."""
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    mergeforge.merge({"merge_method": "linear", "models": models, "dtype": "float32"}, out=out, device="cpu", threads=1)
    names = [set(load_file(folder / "model.safetensors")) for folder in (out, folders[0])]
    assert names[0] == names[1]
    model, report = case.load(out)
    assert not any(report.values()), report
    return dict(model.state_dict())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["memory", "bare"])
def test_names_of_the_hub_and_of_the_class(case: Architecture, how: str, tmp_path: Path) -> None:
    """The mean of two models, one of them under other names, in either order; the first model's names are written."""
    models = [case.make(seed) for seed in (1, 2)]
    with quiet():
        models[0].save_pretrained(tmp_path / "hub")
    other = dump(models[1], other_names(models[1], how), tmp_path / "other")
    first, second = (model.state_dict() for model in models)
    for order in ([tmp_path / "hub", other], [other, tmp_path / "hub"]):
        found = merged(case, order, tmp_path / "out")
        for name, value in first.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], (value + second[name]) / 2, rtol=1e-6, atol=1e-6, msg=name)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_single_experts_are_stacked_in_any_blocks(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with single experts merged into one with stacked ones, with blocks of 3 rows: as with both stacked."""
    from mergeforge.core import tensor_info

    case = next(one for one in ARCHITECTURES if one.kind == "mixtral")
    models = [case.make(seed) for seed in (1, 2)]
    with quiet():
        models[1].save_pretrained(tmp_path / "single")
    folders = [dump(model, other_names(model, "memory"), tmp_path / f"stacked-{at}") for at, model in enumerate(models)]
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 100)
    results = []
    for at, second in enumerate((tmp_path / "single", folders[1])):
        recipe: dict[str, Any] = {"merge_method": method, "base_model": str(folders[0]), "parameters": {"t": 0.3}}
        recipe["models"] = [{"model": str(second), "parameters": {"weight": 0.5}}]
        if method == "linear":
            recipe |= {"parameters": {"normalize": False}}
        out = mergeforge.merge(recipe, out=tmp_path / f"out-{at}", device="cpu", threads=1)
        results.append(load_file(out / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(value.equal(results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("reference_has_it", [True, False])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_buffers_of_one_model(reference_has_it: bool, method: str, tmp_path: Path) -> None:
    """inv_freq that one of two models stores: the reference's bytes are kept, another model's are left out."""
    case = next(one for one in ARCHITECTURES if one.kind == "llama")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for seed, name in enumerate("ab"):
        model = case.make(seed)
        extra = {buffer: torch.rand(4)} if (name == "a") == reference_has_it else {}
        dump(model, {**model.state_dict(), **extra}, tmp_path / name)
    models: list[Any] = [str(tmp_path / name) for name in "ab"]
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": name} for name in models]}
    recipe["models"][1]["parameters"] = {"weight": 0.3} if method != "slerp" else {}
    recipe["models"][0]["parameters"] = {"weight": 0.9} if method == "linear" else {}
    recipe |= {"base_model": models[0]} if method != "linear" else {}
    recipe |= {"parameters": {"t": 0.3}} if method == "slerp" else {}
    recipe["models"] = recipe["models"][1:] if method == "task_arithmetic" else recipe["models"]
    plan = mergeforge.plan(recipe, out=tmp_path / "out", device="cpu")
    assert any("buffers (rotary_emb.inv_freq)" in note for note in plan.notes)
    found = load_file(mergeforge.merge(recipe, out=tmp_path / "out", device="cpu") / "model.safetensors")
    assert (buffer in found) == reference_has_it
    if reference_has_it:
        assert found[buffer].equal(load_file(tmp_path / "a" / "model.safetensors")[buffer])


def test_a_causal_mask_is_a_buffer_and_a_bias_is_not(tmp_path: Path) -> None:
    """GPT-2's attn.bias mask is left out where only one model has it; a missing c_attn.bias is an error."""
    case = next(one for one in ARCHITECTURES if one.kind == "gpt2")
    models = [case.make(seed) for seed in (1, 2)]
    mask = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.tensor(0.0),
    }
    dump(models[0], models[0].state_dict(), tmp_path / "a")
    dump(models[1], {**models[1].state_dict(), **mask}, tmp_path / "b")
    merged(case, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    lacking = dict(models[1].state_dict())
    del lacking["transformer.h.1.attn.c_attn.bias"]
    dump(models[1], lacking, tmp_path / "c")
    with pytest.raises(SourceError, match=r"lacks transformer\.h\.1\.attn\.c_attn\.bias"):
        merged(case, [tmp_path / "a", tmp_path / "c"], tmp_path / "out2")
