"""extract-lora: the adapter, folded by PEFT and by mergeforge, compared with the tuned model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.changed_models import load, load_adapted, logits, merged_by_peft, save_pair, tensors
from support.quiet import quiet

import mergeforge
from mergeforge.cli import run_command
from mergeforge.errors import BudgetError, MergeforgeError, OutputError, RecipeError, SourceError
from mergeforge.lora.extract import extract, extract_lora, plan_extraction

Pair = tuple[Path, Path]


def run_extraction(pair: Pair, out: Path, **options: Any) -> dict[str, Any]:
    """Extract into OUT and return the report."""
    return extract_lora(str(pair[1]), str(pair[0]), out, **{"rank": 8, "device": "cpu"} | options)


def change_tensors(tuned: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    stored = tensors(tuned)
    edit(stored)
    save_file(stored, tuned / "model.safetensors", {"format": "pt"})


def relative_tail(change: torch.Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(change.double()).square()
    return float((squares[rank:].sum() / squares.sum()).sqrt())


@pytest.fixture
def llama(tmp_path: Path) -> Pair:
    return save_pair(tmp_path, "llama", 4)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_low_rank_change_is_restored_by_peft(tmp_path: Path, kind: str) -> None:
    pair = save_pair(tmp_path, kind, 4)
    report = run_extraction(pair, tmp_path / "out")
    assert report["error"] < 1e-5
    assert {entry["rank"] for entry in report["modules"].values()} == {4}
    merged, tuned = merged_by_peft(pair[0], tmp_path / "out"), load(pair[1]).state_dict()
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-6) for name in tuned)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_low_rank_change_is_restored_by_mergeforge(tmp_path: Path, kind: str) -> None:
    pair = save_pair(tmp_path, kind, 4)
    run_extraction(pair, tmp_path / "out")
    merged = mergeforge.merge(base_model=str(pair[0]), adapters=[str(tmp_path / "out")], out=tmp_path / "merged")
    assert tensors(merged).keys() == tensors(pair[1]).keys()
    assert all(torch.allclose(value, tensors(merged)[name], atol=1e-6) for name, value in tensors(pair[1]).items())


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_reported_error_equals_the_error_after_folding(tmp_path: Path, svd: str) -> None:
    pair = save_pair(tmp_path, "llama", 20)
    report = run_extraction(pair, tmp_path / "out", rank=6, svd=svd, dtype="bfloat16")
    merged, tuned, base = merged_by_peft(pair[0], tmp_path / "out"), *(load(entry).state_dict() for entry in pair[::-1])
    for module, entry in report["modules"].items():
        change = tuned[f"{module}.weight"] - base[f"{module}.weight"]
        remaining = (tuned[f"{module}.weight"] - merged[f"{module}.weight"]).norm() / change.norm()
        assert entry["error"] == pytest.approx(float(remaining), rel=1e-3)
        assert entry["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert entry["error"] == pytest.approx(relative_tail(change, 6), rel=0.01)


def test_error_includes_the_rounding_of_the_written_factors(llama: Pair, tmp_path: Path) -> None:
    report = run_extraction(llama, tmp_path / "out", dtype="bfloat16")
    base, tuned, stored = *map(tensors, llama), tensors(tmp_path / "out", "adapter_model.safetensors")
    for module, entry in report["modules"].items():
        a, b = (stored[f"base_model.model.{module}.lora_{which}.weight"].float() for which in "AB")
        change = tuned[f"{module}.weight"] - base[f"{module}.weight"]
        assert entry["error"] == pytest.approx(float((change - b @ a).norm() / change.norm()), rel=1e-3)
        assert 1e-4 < entry["error"] < 1e-2 and entry["energy"] == pytest.approx(1)


def test_save_rest_restores_every_change(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "qwen2", 4, also=("embed_tokens", "lm_head", "norm", "bias"))
    report = run_extraction(pair, tmp_path / "out", save_rest=True)
    assert not report["not_held"] and report["total_error"] < 1e-5
    assert torch.allclose(logits(load_adapted(pair[0], tmp_path / "out")), logits(load(pair[1])), atol=1e-4)
    merged = mergeforge.merge(base_model=str(pair[0]), adapters=[str(tmp_path / "out")], out=tmp_path / "merged")
    assert all(torch.allclose(value, tensors(merged)[name], atol=1e-6) for name, value in tensors(pair[1]).items())


def test_layer_norms_with_biases_are_restored(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "gpt2", 4, also=("wte", "wpe", "ln_", "bias"))
    report = run_extraction(pair, tmp_path / "out", save_rest=True)
    assert not report["not_held"]
    assert torch.allclose(logits(load_adapted(pair[0], tmp_path / "out")), logits(load(pair[1])), atol=1e-4)
    merged = mergeforge.merge(base_model=str(pair[0]), adapters=[str(tmp_path / "out")], out=tmp_path / "merged")
    assert torch.allclose(logits(load(merged)), logits(load(pair[1])), atol=1e-4)


def test_single_changed_bias_is_restored(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "qwen2", 4, also=("0.self_attn.q_proj.bias",), only="layers.1")
    run_extraction(pair, tmp_path / "out", save_rest=True)
    assert torch.allclose(logits(load_adapted(pair[0], tmp_path / "out")), logits(load(pair[1])), atol=1e-4)


def test_changes_that_are_not_stored_are_listed_with_their_size(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "llama", 4, also=("model.norm",))
    report = run_extraction(pair, tmp_path / "out")
    base, tuned = (tensors(folder)["model.norm.weight"] for folder in pair)
    assert list(report["not_held"]) == ["model.norm.weight"]
    assert report["not_held"]["model.norm.weight"]["norm"] == pytest.approx(float((tuned - base).norm()), rel=1e-5)
    assert report["not_held"]["model.norm.weight"]["relative"] == pytest.approx(
        float((tuned - base).norm() / base.norm()), rel=1e-5
    )
    assert report["total_error"] > report["error"]


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_changed_embeddings_are_saved_whole(tmp_path: Path, kind: str) -> None:
    pair = save_pair(tmp_path, kind, 4, also=("embed_tokens", "lm_head"))
    report = run_extraction(pair, tmp_path / "out")
    assert list(report["saved"]) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert torch.allclose(logits(load_adapted(pair[0], tmp_path / "out")), logits(load(pair[1])), atol=1e-4)
    merged = mergeforge.merge(base_model=str(pair[0]), adapters=[str(tmp_path / "out")], out=tmp_path / "merged")
    assert all(torch.allclose(value, tensors(merged)[name], atol=1e-6) for name, value in tensors(pair[1]).items())


def test_embeddings_as_factors(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "llama", 4, also=("embed_tokens", "lm_head"))
    report = run_extraction(pair, tmp_path / "out", embeddings="lora", rank=32)
    assert report["modules"]["model.embed_tokens"]["error"] < 1e-5
    assert torch.allclose(logits(load_adapted(pair[0], tmp_path / "out")), logits(load(pair[1])), atol=1e-4)


def test_untied_head_is_saved_for_a_tied_base(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama-tied", 4)
    embedding = tensors(base)["model.embed_tokens.weight"]
    change_tensors(tuned, lambda stored: stored.update({"lm_head.weight": embedding + 0.01}))
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    report = run_extraction((base, tuned), tmp_path / "out")
    assert list(report["saved"]) == ["lm_head.weight"]
    assert torch.allclose(logits(load_adapted(base, tmp_path / "out")), logits(load(tuned)), atol=1e-4)
    merged = mergeforge.merge(base_model=str(base), adapters=[str(tmp_path / "out")], out=tmp_path / "merged")
    assert torch.allclose(logits(load(merged)), logits(load(tuned)), atol=1e-4)


def test_unchanged_modules_get_no_factors(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "llama", 4, only="1.self_attn.q_proj")
    report = run_extraction(pair, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert list(report["modules"]) == ["model.layers.1.self_attn.q_proj"]
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert torch.allclose(logits(load_adapted(pair[0], tmp_path / "out")), logits(load(pair[1])), atol=1e-4)


def test_energy_gives_each_module_its_own_rank(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "llama", 20)
    report = run_extraction(pair, tmp_path / "out", rank=None, energy=0.9)
    base, tuned = (tensors(entry) for entry in pair)
    for module, entry in report["modules"].items():
        squares = torch.linalg.svdvals((tuned[f"{module}.weight"] - base[f"{module}.weight"]).double()).square()
        assert entry["rank"] == int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
        assert entry["energy"] >= 0.9
    assert len({entry["rank"] for entry in report["modules"].values()}) > 1
    merged = merged_by_peft(pair[0], tmp_path / "out")
    expected = mergeforge.merge(base_model=str(pair[0]), adapters=[str(tmp_path / "out")], out=tmp_path / "merged")
    assert all(torch.allclose(entry, merged[name], atol=1e-6) for name, entry in tensors(expected).items())


def test_include_and_exclude_select_by_name(llama: Pair, tmp_path: Path) -> None:
    report = run_extraction(llama, tmp_path / "out", include=["self_attn"], exclude=["layers.0"])
    assert list(report["modules"]) == [f"model.layers.1.self_attn.{letter}_proj" for letter in "koqv"]
    assert "model.layers.0.self_attn.q_proj.weight" in report["left_out"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory", ["16MiB", "1GiB"])
def test_bytes_do_not_depend_on_memory_and_threads(llama: Pair, tmp_path: Path, memory: str, threads: int) -> None:
    for name, options in {"one": {}, "other": {"memory": memory, "threads": threads}}.items():
        run_extraction(llama, tmp_path / name, svd="randomized", **options)
    for file in ("adapter_model.safetensors", "adapter_config.json", "extraction.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_resized_vocabulary_is_saved_whole(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", 4)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change_tensors(
            tuned, lambda weights, name=name: weights.update({name: torch.cat([weights[name], weights[name][:2]])})
        )
    report = run_extraction((base, tuned), tmp_path / "out")
    assert report["saved"]["lm_head.weight"]["shape"] == [50, 32]
    merged = mergeforge.merge(base_model=str(base), adapters=[str(tmp_path / "out")], out=tmp_path / "merged")
    assert all(torch.allclose(value, tensors(merged)[name], atol=1e-6) for name, value in tensors(tuned).items())
    with pytest.raises(SourceError, match="the vocabulary was resized"):
        run_extraction((base, tuned), tmp_path / "other", embeddings="lora")


def test_headless_checkpoint_gets_names_with_the_head_models_prefix(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "gpt2", 4)
    for folder in (base, tuned):
        bare = {name.removeprefix("transformer."): value for name, value in tensors(folder).items()}
        save_file(bare, folder / "model.safetensors", {"format": "pt"})
    run_extraction((base, tuned), tmp_path / "out")
    assert torch.allclose(logits(load_adapted(base, tmp_path / "out")), logits(load(tuned)), atol=1e-4)


def test_experts_are_restored_by_peft(tmp_path: Path) -> None:
    import peft

    base, tuned = save_pair(tmp_path, "mixtral", 4)
    report = run_extraction((base, tuned), tmp_path / "out")
    assert "model.layers.0.block_sparse_moe.experts.3.w1" in report["modules"] and not report["notes"]
    with quiet():
        adapted = peft.PeftModel.from_pretrained(load(base), tmp_path / "out").eval()
    assert torch.allclose(logits(adapted), logits(load(tuned)), atol=1e-5)


def test_experts_with_different_ranks_are_noted(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "mixtral", 4, only="layers.1")
    assert "needs one rank for all" in run_extraction(pair, tmp_path / "out")["notes"][0]


def test_fused_experts_are_listed_as_not_stored(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        weight = torch.full((8, 8), 2.0 if name == "tuned" else 1.0)
        stored = {"a.experts.gate_up_proj": weight.expand(3, 8, 8).contiguous(), "a.q_proj.weight": weight}
        save_file(stored, tmp_path / name / "model.safetensors")
    report = run_extraction((tmp_path / "base", tmp_path / "tuned"), tmp_path / "out")
    assert list(report["not_held"]) == ["a.experts.gate_up_proj"]
    assert report["not_held"]["a.experts.gate_up_proj"]["norm"] == pytest.approx(192**0.5)
    assert report["total_error"] == pytest.approx((192 / 256) ** 0.5)


def test_same_model_twice_is_refused(llama: Pair, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="are the same"):
        run_extraction((llama[0], llama[0]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


INVALID_OPTIONS: dict[str, tuple[dict[str, Any], type[MergeforgeError], str]] = {
    "rank": ({"rank": 0}, RecipeError, "at least 1"),
    "neither": ({"rank": None}, RecipeError, "neither a rank nor an energy"),
    "energy": ({"energy": 1.5}, RecipeError, "not 1.5"),
    "svd": ({"svd": "fast"}, RecipeError, "auto, exact or randomized"),
    "randomized": ({"rank": None, "energy": 0.9, "svd": "randomized"}, RecipeError, "needs a rank"),
    "embeddings": ({"embeddings": "half"}, RecipeError, "lora, save or skip"),
    "regex": ({"include": ["("]}, RecipeError, "not a regular expression"),
    "dtype": ({"dtype": "int8"}, RecipeError, "float32, bfloat16 or float16"),
    "device": ({"device": "abacus"}, RecipeError, "abacus"),
    "memory": ({"memory": "1MiB"}, BudgetError, "too little"),
}


@pytest.mark.parametrize("name", INVALID_OPTIONS)
def test_invalid_options_are_refused_before_anything_is_read(llama: Pair, tmp_path: Path, name: str) -> None:
    options, kind, text = INVALID_OPTIONS[name]
    with pytest.raises(kind, match=text):
        run_extraction(llama, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_budget_error_names_the_memory_that_suffices(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file({"a.q_proj.weight": torch.zeros(2048, 2048)}, tmp_path / name / "model.safetensors")
    with pytest.raises(BudgetError, match=r"a\.q_proj\.weight needs .* only 67\.1 MB is available") as caught:
        plan_extraction(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "out", energy=0.5, memory="64MiB")
    enough = re.search(r"--memory (\d+MiB)", caught.value.command_hint)
    assert enough
    options: dict[str, Any] = {"energy": 0.5, "memory": enough[1], "threads": 1, "device": "cpu"}
    assert plan_extraction(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "out", **options).tasks


def test_different_shapes_and_tensors_are_refused(llama: Pair, tmp_path: Path) -> None:
    _, tuned = llama
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(tuned, lambda stored: stored.update({name: stored[name][:40].clone()}))
    with pytest.raises(SourceError, match=r"up_proj.weight is \[48, 32\] in .* and \[40, 32\] in"):
        run_extraction(llama, tmp_path / "out")
    change_tensors(tuned, lambda stored: stored.__delitem__(name))
    with pytest.raises(SourceError, match=f"has no {name}"):
        run_extraction(llama, tmp_path / "out")
    with pytest.raises(SourceError, match=f"has no {name}"):
        run_extraction(llama[::-1], tmp_path / "out")


def test_nan_is_refused_with_the_tensors_name(llama: Pair, tmp_path: Path) -> None:
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        change_tensors(llama[1], lambda stored, name=name: stored.update({name: stored[name] * torch.nan}))
        with pytest.raises(SourceError, match=f"{name} has infinite or NaN"):
            run_extraction(llama, tmp_path / "out", include=[name])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.mergeforge").exists()


def test_factors_of_a_changed_tied_embedding_are_refused(tmp_path: Path) -> None:
    run_extraction(save_pair(tmp_path / "same", "llama-tied", 4), tmp_path / "out", embeddings="lora")
    pair = save_pair(tmp_path / "changed", "llama-tied", 4, also=("embed_tokens",))
    with pytest.raises(SourceError, match="both embedding and output head"):
        run_extraction(pair, tmp_path / "other", embeddings="lora")


def test_quantized_model_is_refused(llama: Pair, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(llama[1], lambda stored: stored.update({name: stored[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(SourceError, match=r"up_proj\.weight is quantized \(F8_E4M3\)"):
        run_extraction(llama, tmp_path / "out")


def test_adapter_as_input_is_refused(llama: Pair, tmp_path: Path) -> None:
    run_extraction(llama, tmp_path / "out")
    with pytest.raises(SourceError, match="is an adapter"):
        run_extraction((llama[0], tmp_path / "out"), tmp_path / "other")


def test_out_that_is_an_input_or_has_other_files_is_refused(llama: Pair, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not a part of the adapter"):
        run_extraction(llama, llama[0], overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match=r"diary\.txt"):
        run_extraction(llama, tmp_path / "mine", overwrite=True)


def test_finished_adapter_is_replaced_only_with_overwrite(llama: Pair, tmp_path: Path) -> None:
    first = run_extraction(llama, tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="already holds an adapter"):
        run_extraction(llama, tmp_path / "out")
    again = run_extraction(llama, tmp_path / "out", overwrite=True)
    assert first["options"]["rank"] == 2 and again["options"]["rank"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_interrupted_run_keeps_the_old_adapter(llama: Pair, tmp_path: Path) -> None:
    run_extraction(llama, tmp_path / "out", rank=2)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    plan = plan_extraction(str(llama[1]), str(llama[0]), tmp_path / "out", rank=3, device="cpu", overwrite=True)
    results = extract(plan)
    next(results)
    results.close()  # type: ignore[attr-defined]  # a generator
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / ".out.mergeforge").exists()
    (tmp_path / "out").rename(tmp_path / ".out.mergeforge-old")  # killed between its two renames
    with pytest.raises(OutputError, match="already holds an adapter"):
        run_extraction(llama, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_leftovers_of_a_killed_run_are_removed(llama: Pair, tmp_path: Path) -> None:
    (tmp_path / ".out.mergeforge" / "junk").mkdir(parents=True)
    (tmp_path / ".out.mergeforge" / "spool").write_bytes(b"half")
    run_extraction(llama, tmp_path / "out")
    stored = ["README.md", "adapter_config.json", "adapter_model.safetensors", "extraction.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == stored


def test_second_run_into_the_same_folder_is_refused(llama: Pair, tmp_path: Path) -> None:
    plan = plan_extraction(str(llama[1]), str(llama[0]), tmp_path / "out", rank=3, device="cpu")
    first = extract(plan)
    next(first)
    with pytest.raises(OutputError, match="another run writes"):
        run_extraction(llama, tmp_path / "out")
    deque(first, maxlen=0)
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_input_that_changed_during_the_run_is_refused(llama: Pair, tmp_path: Path) -> None:
    plan = plan_extraction(str(llama[1]), str(llama[0]), tmp_path / "out", rank=3, device="cpu")
    results = extract(plan)
    next(results)
    os.utime(llama[1] / "model.safetensors", (1, 1))
    with pytest.raises(SourceError, match="changed while it was read"):
        deque(results, maxlen=0)
    assert not (tmp_path / "out").exists()


def _sum_of_counts(output: str) -> bool:
    """Whether the report's counts of tensors add up to all of them."""
    (line,) = re.findall(r"^(\d+) tensors: (.+)$", output, re.MULTILINE)
    return int(line[0]) == sum(int(part.split()[0]) for part in re.findall(r"\d+ [a-z]+", line[1]))


def test_the_report_counts_every_tensor_once(llama: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms change in every layer: one line for all of them, and counts that add up, also with --include."""
    tuned = tmp_path / "norms"
    shutil.copytree(llama[1], tuned)
    stored = load_file(tuned / "model.safetensors")
    changed = {name: tensor * 1.5 if "norm" in name else tensor for name, tensor in stored.items()}
    save_file(changed, tuned / "model.safetensors", {"format": "pt"})
    command = ["extract-lora", str(tuned), "--base", str(llama[0]), "--out", str(tmp_path / "o"), "--rank", "2"]
    assert run_command([*command, "--device", "cpu"]) == 0
    output = capsys.readouterr().err
    norms = sum("norm" in name for name in stored)
    assert _sum_of_counts(output) and f"{norms} changed, but not in the adapter" in output
    layers = sum(name.endswith("input_layernorm.weight") for name in stored)
    assert f"model.layers.*.input_layernorm.weight ({layers} tensors, changed by 50 %)" in output
    assert run_command([*command, "--device", "cpu", "--include", "q_proj", "--overwrite"]) == 0
    output = capsys.readouterr().err
    assert _sum_of_counts(output) and "excluded by --include or --exclude" in output
    assert "0 tensors" not in (tmp_path / "o" / "README.md").read_text()


def test_command_prints_the_report(llama: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extract-lora", str(llama[1]), "--base", str(llama[0]), "--out", str(tmp_path / "out"), "--rank", "2"]
    assert run_command([*command, "--device", "cpu"]) == 0
    output = capsys.readouterr().err
    assert "model.layers.*.self_attn.q_proj   2       2" in output and f"wrote {tmp_path / 'out'}" in output
    assert _sum_of_counts(output)
    assert run_command([*command, "--device", "cpu"]) == 5
    assert run_command([*command, "--device", "cpu", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"]["model.layers.1.mlp.up_proj"]["rank"] == 2
    assert run_command(["extract-lora", str(llama[1]), "--base", str(llama[0]), "--out", "x"]) == 2
