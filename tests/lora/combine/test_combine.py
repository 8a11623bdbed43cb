"""Several adapters combined into one, compared with the sum of their deltas and PEFT's add_weighted_adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.changed_models import load, load_adapted, logits, make_model, merged_by_peft, tensors
from support.quiet import quiet

import mergeforge
from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.open import open_adapter
from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.errors import BudgetError, OutputError, RecipeError, SourceError
from mergeforge.lora.combine import CombinedModule, combine_adapters, folded_terms, plan_combination, weighted_terms

WEIGHTS = (0.7, -0.4)
Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Makes adapters with random factors on a base in tmp_path / "base"."""
    import peft

    def trained(name: str, kind: str = "llama", **config: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | config
        with quiet():
            base = make_model(kind)
            base.save_pretrained(tmp_path / "base")
            model = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
            generator = torch.Generator().manual_seed(len(name) + int(settings["r"]))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return trained


def combine(
    folders: Sequence[Path], out: Path, weights: Sequence[float] = WEIGHTS, **options: Any
) -> list[CombinedModule]:
    base = open_checkpoint(folders[0].parent / "base", "base")
    adapters = [open_adapter(folder, str(folder), base) for folder in folders]
    plan = plan_combination(adapters, weighted_terms(adapters, weights), base, **options)
    return combine_adapters(plan, out)


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    merged, before = merged_by_peft(base, adapter), load(base).state_dict()
    return {name: merged[name].double() - before[name].double() for name in before}


def weighted_sum(folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    first, second = (deltas(folder.parent / "base", folder) for folder in folders)
    return {name: WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name] for name in first}


@pytest.mark.parametrize(
    "other",
    [
        {"r": 2, "lora_alpha": 3},
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
        {"r": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
        {"r": 3, "target_modules": ["lm_head", "embed_tokens"]},
    ],
    ids=["rank", "rslora", "patterns", "embeddings"],
)
def test_combined_logits_equal_the_weighted_sum(train: Train, tmp_path: Path, other: dict[str, Any]) -> None:
    folders = [train("one"), train("other", **other)]
    combine(folders, tmp_path / "out")
    model = load(tmp_path / "base")
    stored = dict(model.state_dict())
    model.load_state_dict(
        {name: (stored[name].double() + change).float() for name, change in weighted_sum(folders).items()}
    )
    assert torch.allclose(logits(load_adapted(tmp_path / "base", tmp_path / "out")), logits(model), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_combined_deltas_equal_the_weighted_sum(train: Train, tmp_path: Path, kind: str) -> None:
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "v_proj"]
    folders = [train("one", kind, target_modules=targets), train("other", kind, r=2, target_modules=targets)]
    combine(folders, tmp_path / "out")
    actual, expected = deltas(tmp_path / "base", tmp_path / "out"), weighted_sum(folders)
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)


def test_combined_adapter_folds_like_the_adapters(train: Train, tmp_path: Path) -> None:
    folders = [train("one"), train("other", r=2)]
    combine(folders, tmp_path / "out")
    base, options = str(tmp_path / "base"), {"method": "task_arithmetic"}
    apart = mergeforge.merge(
        base_model=base, adapters=list(map(str, folders)), weights=WEIGHTS, out=tmp_path / "apart", **options
    )
    whole = mergeforge.merge(base_model=base, adapters=[str(tmp_path / "out")], out=tmp_path / "whole")
    assert all(torch.allclose(value, tensors(whole)[name], atol=1e-6) for name, value in tensors(apart).items())


@pytest.mark.parametrize("rank", [None, 3])
def test_combined_adapter_equals_peft_add_weighted_adapter(train: Train, tmp_path: Path, rank: int | None) -> None:
    folders = [train("one"), train("other", r=2)]
    combine(folders, tmp_path / "out", rank=rank)
    with quiet():
        model = load_adapted(tmp_path / "base", folders[0])
        model.load_adapter(folders[1], "other")
        how = {"combination_type": "svd", "svd_rank": rank} if rank else {"combination_type": "cat"}
        model.add_weighted_adapter(["default", "other"], list(WEIGHTS), "sum", **how)
        model.set_adapter("sum")
        theirs = logits(model)
    assert torch.allclose(logits(load_adapted(tmp_path / "base", tmp_path / "out")), theirs, atol=1e-5)


def test_truncation_error_equals_the_dense_svd_tail(train: Train, tmp_path: Path) -> None:
    folders = [train("one"), train("other", r=2)]
    modules = combine(folders, tmp_path / "out", rank=3)
    change = weighted_sum(folders)
    report = json.loads((tmp_path / "out" / "joining.json").read_text())
    for module in modules:
        squares = torch.linalg.svdvals(change[f"{module.module}.weight"]).square()
        assert module.error == pytest.approx(float((squares[3:].sum() / squares.sum()).sqrt()), abs=1e-5)
        assert (module.rank, module.summed_rank) == (3, 6)
        assert report["modules"][module.module]["error"] == module.error


def test_energy_truncates_each_module_to_its_own_rank(train: Train, tmp_path: Path) -> None:
    folders = [train("one"), train("other", r=2)]
    modules = combine(folders, tmp_path / "out", energy=0.8)
    assert all(module.error**2 <= 0.2 + 1e-9 and 0 < module.rank < 6 for module in modules)
    load_adapted(tmp_path / "base", tmp_path / "out")


def test_ranks_above_the_matrix_are_compressed(train: Train, tmp_path: Path) -> None:
    folders = [train("one", r=30), train("other", r=20)]
    modules = combine(folders, tmp_path / "out")
    assert {module.rank for module in modules} == {32, 16}  # of 32 inputs; v_proj has 16 outputs
    change, expected = deltas(tmp_path / "base", tmp_path / "out"), weighted_sum(folders)
    assert all(torch.allclose(change[name], expected[name], atol=1e-5) for name in expected)


def test_config_keeps_what_the_adapters_have_in_common(train: Train, tmp_path: Path) -> None:
    folders = [train("one"), train("other", r=2, target_modules=["q_proj"])]
    combine(folders, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("CAUSAL_LM", 6, 6)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert {value.dtype for value in tensors(tmp_path / "out", "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


def test_terms_equal_those_of_the_planned_merge(train: Train) -> None:
    folders = [train("one"), train("other", r=2, target_modules=["q_proj"])]
    base = open_checkpoint(folders[0].parent / "base", "base")
    first, second = (open_adapter(folder, folder.name, base) for folder in folders)
    name, untouched = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    lazy_tensor = AdaptedTensor(base.tensors[name], ((0.5, first.deltas[name][0]), (2.0, second.deltas[name][0])))
    tensors_by_name = {name: lazy_tensor, untouched: base.tensors[untouched]}
    assert folded_terms(tensors_by_name, base, [first, second]) == {name: lazy_tensor.terms}
    with pytest.raises(RecipeError, match="more than the base plus weighted adapters"):
        folded_terms({name: AdaptedTensor(lazy_tensor, lazy_tensor.terms)}, base, [first, second])


def test_adapters_that_cancel_out_are_refused(train: Train, tmp_path: Path) -> None:
    folders = [train("one"), train("one")]
    with pytest.raises(SourceError, match="cancel each other"):
        combine(folders, tmp_path / "out", (1.0, -1.0), rank=2)
    with pytest.raises(SourceError, match="change nothing"):
        combine(folders, tmp_path / "out", (0.0, 0.0))
    assert not (tmp_path / "out").exists()


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA"),
    "saved": ({"modules_to_save": ["lm_head"]}, "replaced"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trained tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_with_more_than_factors_are_refused(train: Train, tmp_path: Path, name: str) -> None:
    config, kind = REFUSED[name]
    folders = [train("one"), train("other", **config)]
    with pytest.raises(SourceError, match=rf"other: its change of .* \({kind}\)"):
        combine(folders, tmp_path / "out")


def test_tied_embedding_is_refused(train: Train, tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    folders = [train("one", "llama-tied"), train("other", "llama-tied", **config)]
    with pytest.raises(SourceError, match="which is also the output head"):
        combine(folders, tmp_path / "out")


def test_invalid_options_are_refused(train: Train, tmp_path: Path) -> None:
    folders = [train("one"), train("other", r=2)]
    for options in ({"rank": 0}, {"energy": 0.0}, {"dtype": "int4"}):
        with pytest.raises(RecipeError):
            combine(folders, tmp_path / "out", **options)
    with pytest.raises(BudgetError, match="combining ranks of 6"):
        combine(folders, tmp_path / "out", memory=1000)
    with pytest.raises(OutputError, match="is not a part of the adapter"):
        combine(folders, tmp_path / "base")


def test_nan_is_refused_with_the_modules_name(train: Train, tmp_path: Path) -> None:
    folders = [train("one"), train("other", r=2)]
    stored = tensors(folders[0], "adapter_model.safetensors")
    name = next(name for name in stored if "down_proj.lora_A" in name)
    save_file(stored | {name: stored[name] * torch.nan}, folders[0] / "adapter_model.safetensors")
    for options in ({}, {"rank": 2}):
        with pytest.raises(SourceError, match=r"down_proj: the adapters have infinite or NaN"):
            combine(folders, tmp_path / "out", **options)
