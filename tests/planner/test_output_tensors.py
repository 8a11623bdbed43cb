"""Which models are merged into each output tensor: slices, modules, rules, documents. Model n holds n everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge.errors import MergeforgeError, RecipeError, SourceError
from mergeforge.planner.layer_slices import layer_prefix, with_layer

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
Made = Mapping[str, torch.Tensor]


def write(folder: Path, value: float, layers: int = 4, more: Mapping[str, Any] = {}, **config: Any) -> Path:
    """A model whose layer k holds value + k / 100 everywhere, and `value` outside the layers."""
    folder.mkdir()
    names = {"model.embed_tokens.weight": value, "model.norm.weight": value, "lm_head.weight": value}
    names |= {f"model.layers.{at}.mlp.up_proj.weight": value + at / 100 for at in range(layers)}
    names |= {f"model.layers.{at}.self_attn.q_proj.weight": value + at / 100 for at in range(layers)}
    tensors = {name: torch.full((4, 6), float(one)) for name, one in names.items()} | dict(more)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers, **config}))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for value in (1, 2, 3):
        write(tmp_path / str(value), value)
    return tmp_path


def merged(models: Path, recipe: Any, **options: Any) -> Made:
    """The result's tensors; models are named 1, 2, 3."""
    out = mergeforge.merge(with_paths(recipe, models), out=models / "out", overwrite=True, device="cpu", **options)
    return load_file(out / "model.safetensors")


def with_paths(value: Any, models: Path) -> Any:
    if isinstance(value, list):
        return [with_paths(item, models) for item in value]
    if isinstance(value, dict):
        return {key: with_paths(item, models) for key, item in value.items()}
    return str(models / str(value)) if isinstance(value, str) and value in "123" else value


def value(tensors: Made, name: str) -> float:
    """What a tensor holds everywhere."""
    assert bool((tensors[name] == tensors[name].flatten()[0]).all())
    return round(float(tensors[name].flatten()[0]), 4)


def layer(at: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{at}.{part}.weight"


def sliced(name: str, first: int, stop: int) -> dict[str, Any]:
    return {"model": name, "layer_range": [first, stop]}


def config(models: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((models / "out" / "config.json").read_text())
    return found


# slices


def test_layers_are_stacked_and_renumbered(models: Path) -> None:
    slices = [{"sources": [sliced("1", 0, 3)]}, {"sources": [sliced("2", 1, 4)]}]
    made = merged(models, {"merge_method": "passthrough", "slices": slices})
    assert [value(made, layer(at)) for at in range(6)] == [1.0, 1.01, 1.02, 2.01, 2.02, 2.03]
    assert layer(6) not in made and config(models)["num_hidden_layers"] == 6


def test_embedding_comes_from_the_first_slice_and_head_from_the_last(models: Path) -> None:
    slices = [{"sources": [sliced("1", 0, 1)]}, {"sources": [sliced("2", 0, 1)]}]
    made = merged(models, {"merge_method": "passthrough", "slices": slices})
    values = [value(made, name) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")]
    assert values == [1, 2, 2]


def test_unmerged_layers_are_copied_not_computed(models: Path) -> None:
    """Stacking whole layers takes no arithmetic: their bytes are copied."""
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [sliced("1", 2, 4)]}, {"sources": [sliced("1", 2, 4)]}],
    }
    plan = mergeforge.plan(with_paths(recipe, models), out=models / "out")
    assert {tensor_plan.backend.name for tensor_plan in plan.tensor_plans} == {"copy"}


@pytest.mark.parametrize(
    "slices, problem, hint",
    [
        ([[sliced("1", 2, 5)]], "layer_range [2, 5] of .*1 goes beyond its 4 layers", "the last layer is 3"),
        ([[sliced("1", 0, 2)], [sliced("2", 9, 10)]], "layer_range [9, 10] of .*2 goes beyond its 4 layers", ""),
    ],
)
def test_a_layer_range_beyond_the_model_is_refused(models: Path, slices: list[Any], problem: str, hint: str) -> None:
    recipe = {"merge_method": "passthrough", "slices": [{"sources": one} for one in slices]}
    with pytest.raises(RecipeError, match=problem.replace("[", r"\[").replace("]", r"\]")) as caught:
        mergeforge.plan(with_paths(recipe, models), out=models / "out")
    assert hint in caught.value.hint and not (models / "out").exists()


def test_lists_with_an_entry_for_each_layer_follow_their_layers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    write(tmp_path / "1", 1, layer_types=kinds, mlp_only_layers=[0, 3], eos_token_id=[1, 2, 3, 4])
    slices = [{"sources": [sliced("1", 1, 3)]}, {"sources": [sliced("1", 1, 4)]}]
    merged(tmp_path, {"merge_method": "passthrough", "slices": slices})
    assert config(tmp_path)["layer_types"] == [kinds[at] for at in (1, 2, 1, 2, 3)]
    assert config(tmp_path)["mlp_only_layers"] == [4]
    assert config(tmp_path)["eos_token_id"] == [1, 2, 3, 4]


def test_sliding_layers_given_by_a_rule_are_written_out(tmp_path: Path) -> None:
    """Every other layer of Gemma 2 has sliding attention, which no longer holds after [0, 1, 1, 2]."""
    write(tmp_path / "1", 1, model_type="gemma2")
    slices = [{"sources": [sliced("1", 0, 2)]}, {"sources": [sliced("1", 1, 3)]}]
    merged(tmp_path, {"merge_method": "passthrough", "slices": slices})
    short = {"sliding_attention": "s", "full_attention": "f"}
    assert "".join(short[one] for one in config(tmp_path)["layer_types"]) == "sffs"


@pytest.mark.parametrize(
    "more, slices, problem",
    [
        (
            {"first_k_dense_replace": 1},
            [[0, 2], [0, 2]],
            "layer 2 of the stack is of a kind that",
        ),
        (
            {"decoder_sparse_step": 2},
            [[0, 1], [2, 4]],
            "'decoder_sparse_step: 2' which layers differ; layer 2 would become",
        ),
    ],
)
def test_stacks_that_no_config_can_describe_are_refused(tmp_path: Path, more: Any, slices: Any, problem: str) -> None:
    write(tmp_path / "1", 1, **more)
    recipe = {"merge_method": "passthrough", "slices": [{"sources": [sliced("1", *one)]} for one in slices]}
    with pytest.raises(RecipeError, match=problem):
        mergeforge.plan(with_paths(recipe, tmp_path), out=tmp_path / "out")


def test_slices_refer_to_the_language_models_layers() -> None:
    def names(*stacks: tuple[str, int]) -> list[str]:
        return [f"{prefix}.{at}.w" for prefix, depth in stacks for at in range(depth)]

    vlm = names(("vision_tower.layers", 4), ("language_model.model.layers", 4))
    assert layer_prefix(vlm, {"text_config": {"num_hidden_layers": 4}}) == "language_model.model.layers"
    assert layer_prefix(names(("visual.blocks", 9), ("model.layers", 4)), {"num_hidden_layers": 4}) == "model.layers"
    assert layer_prefix(names(("encoder.block", 2)), {}) == "encoder.block"
    with pytest.raises(RecipeError, match="several stacks of layers"):
        layer_prefix(names(("a", 4), ("b", 4)), {})
    with pytest.raises(RecipeError, match="no numbered layers"):
        layer_prefix(["conv.weight"], {})


def test_with_layer_changes_the_layer_number_only() -> None:
    assert with_layer("model.layers.3.mlp.experts.7.w1", 12) == "model.layers.12.mlp.experts.7.w1"
    assert with_layer("0.weight", 5) == "5.weight"


# rules


def test_rules_choose_method_parameters_and_models(models: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "base_model": "1",
        "models": [{"model": "2", "parameters": {"weight": 1}}, {"model": "3", "parameters": {"weight": 3}}],
        "rules": [
            {"match": r"layers\.0\..*mlp", "parameters": {"weight": 1}},
            {
                "match": ["layers.1", r"layers\.2\..*q_proj"],
                "merge_method": "task_arithmetic",
                "parameters": {"lambda": 2},
            },
            {"match": "layers.3", "models": [{"model": "3", "parameters": {"weight": 5}}]},
            {"match": "embed_tokens", "use": "3"},
            {"match": "norm|lm_head", "use": "base"},
        ],
    }
    made = merged(models, recipe)
    assert value(made, layer(0)) == 2.5
    assert value(made, layer(0, "self_attn.q_proj")) == 2.75
    assert value(made, layer(1)) == round(1.01 + 2 * (1 * 1 + 3 * 2), 4)
    assert value(made, layer(2)) == 2.77
    assert value(made, layer(2, "self_attn.q_proj")) == round(1.02 + 2 * (1 * 1 + 3 * 2), 4)
    assert value(made, layer(3)) == 3.03
    values = [value(made, name) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")]
    assert values == [3, 1, 1]


def test_a_last_rule_can_take_everything_else_from_the_base(models: Path) -> None:
    rules = [{"match": "mlp", "merge_method": "linear", "parameters": {"weight": 1}}, {"use": "base"}]
    made = merged(models, {"base_model": "1", "models": ["2", "3"], "rules": rules})
    assert value(made, layer(2)) == 2.52 and value(made, layer(2, "self_attn.q_proj")) == 1.02
    plan = mergeforge.plan(models / "out" / "mergeforge.yml", out=models / "again")
    assert [tensor_plan.backend.name for tensor_plan in plan.tensor_plans].count("copy") == 7


def test_a_tensor_without_rule_or_method_is_an_error(models: Path) -> None:
    rules = [{"match": "mlp", "merge_method": "linear", "parameters": {"weight": 1}}]
    with pytest.raises(RecipeError, match=r"no rule says how to merge .*") as caught:
        mergeforge.plan(with_paths({"models": ["2", "3"], "rules": rules}, models), out=models / "out")
    assert "end the rules with one that has no match" in caught.value.hint


def test_rules_in_slices_use_that_slices_layers(models: Path) -> None:
    slices = [{"sources": [sliced("1", 2, 4), sliced("2", 0, 2)]}]
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": slices}
    made = merged(models, recipe | {"rules": [{"match": "layers.1.mlp", "use": "2"}]})
    assert value(made, layer(1)) == 2.01 and value(made, layer(0)) == round((1.02 + 2.0) / 2, 4)
    with pytest.raises(RecipeError, match="does not say which of its layers"):
        merged(models, recipe | {"rules": [{"match": "layers.1.mlp", "use": "3"}]})


def test_a_tensor_missing_in_one_model_needs_a_rule(models: Path) -> None:
    write(models / "more", 5, more={"model.extra": torch.ones(3), "model.bias": torch.ones(2)})
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "models": ["1", str(models / "more")]}
    with pytest.raises(SourceError, match=r"1 lacks model.*, which .*more has"):
        merged(models, recipe)
    rules = [{"match": "extra", "use": str(models / "more")}, {"match": "bias", "drop": True}]
    made = merged(models, recipe | {"rules": rules})
    assert value(made, "model.extra") == 1 and "model.bias" not in made and value(made, layer(0)) == 3


def test_integers_are_copied_if_equal_and_refused_if_not(models: Path) -> None:
    """Counters and ids that differ cannot be averaged; those that agree are copied."""
    for name, count in (("x", 7), ("y", 8), ("z", 7)):
        write(models / name, 1, more={"norm.num_batches_tracked": torch.tensor([count])})
    recipe: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}}
    same = recipe | {"models": [str(models / "x"), str(models / "z")]}
    assert int(merged(models, same)["norm.num_batches_tracked"]) == 7
    differing = recipe | {"models": [str(models / "x"), str(models / "y")]}
    with pytest.raises(SourceError, match=r"norm.num_batches_tracked is I64, not a float, and differs in"):
        merged(models, differing)
    made = merged(models, differing | {"rules": [{"match": "tracked", "use": str(models / "y")}]})
    assert int(made["norm.num_batches_tracked"]) == 8


# modules


def test_each_module_is_merged_separately(tmp_path: Path) -> None:
    def model(name: str, start: float) -> str:
        (tmp_path / name).mkdir()
        parts = ("encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "shared.weight", "lm_head.weight")
        tensors = {part: torch.full((2, 2), start) for part in parts}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"num_layers": 2, "num_decoder_layers": 1}))
        return str(tmp_path / name)

    one, two = model("one", 1), model("two", 2)
    modules: dict[str, Any] = {
        "encoder": {
            "slices": [
                {"sources": [sliced(two, 1, 2)]},
                {"sources": [sliced(one, 0, 1)]},
                {"sources": [sliced(one, 0, 1)]},
            ]
        },
        "decoder": {"models": [two]},
        "shared": {"models": [one]},
    }
    made = merged(tmp_path, {"merge_method": "passthrough", "modules": modules})
    assert [value(made, f"encoder.block.{at}.w") for at in range(3)] == [2, 1, 1]
    assert [value(made, name) for name in ("decoder.block.0.w", "shared.weight", "lm_head.weight")] == [2, 1, 2]
    assert (config(tmp_path)["num_layers"], config(tmp_path)["num_decoder_layers"]) == (3, 1)
    del modules["encoder"]
    with pytest.raises(RecipeError, match=r"encoder.block.0.w, .* belong to none of the modules decoder, shared"):
        merged(tmp_path, {"merge_method": "passthrough", "modules": modules})


# documents


def test_a_result_is_a_model_like_any_other(models: Path) -> None:
    first = {"name": "half", "merge_method": "linear", "models": ["1", "2"], "parameters": {"weight": 1}}
    second = {"merge_method": "linear", "parameters": {"weight": 1}, "models": ["half", "3"]}
    assert value(merged(models, [first, second]), layer(1)) == round((1.51 + 3.01) / 2, 4)
    assert value(merged(models, [second, first]), layer(1)) == round((1.51 + 3.01) / 2, 4)


def test_the_last_of_named_documents_is_the_result(models: Path) -> None:
    first = {"name": "half", "merge_method": "linear", "models": ["1", "2"], "parameters": {"weight": 1}}
    second = {"name": "whole", "merge_method": "passthrough", "models": ["half"]}
    assert value(merged(models, [first, second]), layer(0)) == 1.5


def test_documents_that_use_each_other_are_refused(models: Path) -> None:
    one = {"name": "x", "merge_method": "passthrough", "models": ["y"]}
    two = {"name": "y", "merge_method": "passthrough", "models": ["x"]}
    three = {"merge_method": "passthrough", "models": ["x"]}
    with pytest.raises(RecipeError, match="the document 'x' uses its own result") as caught:
        merged(models, [one, two, three])
    assert "x -> y -> x" in caught.value.hint


def test_a_result_keeps_its_dtype_but_is_never_rounded(models: Path) -> None:
    """A bfloat16 document gives bfloat16 in the end, from float32 values in between."""
    first: dict[str, Any] = {"name": "a", "merge_method": "linear", "models": ["1", "2"], "dtype": "bfloat16"}
    first["parameters"] = {"weight": 1}
    second = {"merge_method": "linear", "parameters": {"weight": [1.0], "normalize": False}, "models": ["a"]}
    made = merged(models, [first, second])
    assert made[layer(1)].dtype == torch.bfloat16
    third = merged(models, [first, second | {"dtype": "float32"}])
    assert value(third, layer(1)) == 1.51


def test_the_written_recipe_plans_the_same_merge(models: Path) -> None:
    first = {"name": "half", "merge_method": "linear", "models": ["1", "2"], "parameters": {"weight": 1}}
    second = {"merge_method": "passthrough", "models": ["half"]}
    merged(models, [first, second])
    receipt = json.loads((models / "out" / "mergeforge.json").read_text())
    again = mergeforge.plan(models / "out" / "mergeforge.yml", out=models / "again")
    assert again.fingerprint == receipt["fingerprint"]
    assert [Path(one["name"]).name for one in receipt["inputs"]] == ["1", "2"]


def test_the_memory_of_nested_merges_is_planned(models: Path) -> None:
    """The plan of a ties merge of ties merges counts the inner merge's blocks too."""
    inner = {"name": "in", "merge_method": "ties", "base_model": "1", "models": ["2", "3"]}
    inner |= {"parameters": {"weight": 1, "density": 0.5}}
    outer = {
        "merge_method": "ties",
        "base_model": "1",
        "models": ["in", "2"],
        "parameters": {"weight": 1, "density": 0.5},
    }
    plans = [
        mergeforge.plan(with_paths(one, models), out=models / "o", threads=1)
        for one in (inner | {"name": None}, [inner, outer])
    ]
    assert plans[1].peak > plans[0].peak
    assert float(merged(models, [inner, outer])[layer(0)][0, 0]) > 1


def test_the_model_card_lists_every_model(models: Path) -> None:
    first = {"name": "half", "merge_method": "linear", "models": ["1", "2"], "parameters": {"weight": 1}}
    merged(models, [first, {"merge_method": "linear", "parameters": {"weight": 1}, "models": ["half", "3"]}])
    card = (models / "out" / "README.md").read_text()
    assert re.search(r"- 1\n- 2\n- 3\n", card) and "name: half" in card


def test_the_model_card_lists_the_notes(models: Path) -> None:
    merged(models, {"merge_method": "linear", "parameters": {"weight": 1, "int8_mask": True}, "models": ["1", "2"]})
    card = (models / "out" / "README.md").read_text()
    assert "## Notes\n\n- int8_mask has no effect" in card and str(models) not in card.partition("## Recipe")[0]


def test_int8_mask_is_accepted_with_a_note(models: Path) -> None:
    recipe = {"merge_method": "linear", "parameters": {"weight": 1, "int8_mask": True}, "models": ["1", "2"]}
    assert any(
        "int8_mask has no effect" in note
        for note in mergeforge.plan(with_paths(recipe, models), out=models / "o").notes
    )


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_a_base_outside_the_slice_gives_the_same_layers(models: Path, method: str) -> None:
    slices = [{"sources": [sliced("2", 1, 3)]}]
    parameters = {"t": 0.0} if method == "slerp" else {"weight": 0.0}
    made = merged(models, {"merge_method": method, "base_model": "1", "slices": slices, "parameters": parameters})
    assert [value(made, layer(at)) for at in (0, 1)] == [1.01, 1.02]


def test_impossible_slices_are_a_recipe_error(models: Path) -> None:
    """Exit code 2, not that of a bug."""
    wrong = {"merge_method": "slerp", "base_model": "1", "parameters": {"t": 0.5}}
    slices = [{"sources": [sliced("2", 1, 3), sliced("3", 0, 2)]}]
    with pytest.raises(MergeforgeError) as caught:
        merged(models, wrong | {"slices": slices})
    assert caught.value.exit_code == 2
