"""The Python interface: it does what the command line does, in Python's words."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import mergeforge
from mergeforge.cli import COMMANDS, run_command

ADAPTERS_AS_RECIPE = {
    "base_model": "base",
    "adapters": [{"adapter": f"adapters/{name}", "weight": 0.5} for name in "ab"],
}


def weights_of(folder: str | Path) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def test_parts_and_recipe_give_the_same_bytes(models: Path) -> None:
    mergeforge.merge(ADAPTERS_AS_RECIPE, out="one")
    mergeforge.merge(base_model="base", adapters=["adapters/a", "adapters/b"], weights=np.array([0.5, 0.5]), out="two")
    assert weights_of("one") == weights_of("two")


@pytest.mark.parametrize(("method", "parameters"), [("slerp", {"t": 0.5}), ("linear", {}), ("ties", {"density": 0.5})])
def test_parts_without_weights_work_for_every_kind_of_method(
    method: str, parameters: dict[str, float], models: Path
) -> None:
    inputs = ["tuned-a"] if method == "slerp" else ["tuned-a", "tuned-b"]
    out = mergeforge.merge(base_model="base", models=inputs, method=method, parameters=parameters, out="out")
    assert mergeforge.verify(out, deep=True).ok


def test_weights_must_match_and_a_recipe_excludes_its_parts(models: Path) -> None:
    with pytest.raises(mergeforge.RecipeError, match="1 weights for 0 models and 2 adapters"):
        mergeforge.merge(base_model="base", adapters=["adapters/a", "adapters/b"], weights=[1], out="out")
    with pytest.raises(mergeforge.RecipeError, match="not both"):
        mergeforge.merge({"base_model": "base"}, method="linear", out="out")
    with pytest.raises(mergeforge.RecipeError, match="not both"):
        mergeforge.merge({"base_model": "base"}, dtype="float32", out="out")


def test_merge_takes_every_key_of_a_recipe_and_of_its_output(models: Path) -> None:
    out = mergeforge.merge(
        base_model=Path("base"), adapters=["adapters/a"], dtype="float32", gguf=["q8_0"], shard_size="100KB", out="out"
    )
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    assert (out / "out-Q8_0.gguf").is_file() and len(list(out.glob("model-*.safetensors"))) > 1
    recipe = {**ADAPTERS_AS_RECIPE, "adapters": ["adapters/a"], "dtype": "float32"}
    mergeforge.merge(recipe | {"output": {"gguf": ["q8_0"], "shard_size": "100KB"}}, out="as-recipe")
    for name in ("model-00001-of-00004.safetensors", "model.safetensors.index.json"):
        if (out / name).is_file():
            assert (out / name).read_bytes() == Path("as-recipe", name).read_bytes()


def test_run_does_the_work_and_says_what_it_wrote(models: Path) -> None:
    plan = mergeforge.plan(ADAPTERS_AS_RECIPE, out="planned", memory="64MiB")
    result = mergeforge.run(plan)
    assert result.folder == Path("planned") and result.files == (Path("planned/model.safetensors"),)
    assert result.peak > 0 and result.warnings == plan.warnings and result.seconds > 0
    assert mergeforge.verify(result.folder, deep=True).ok
    Path("recipe.yaml").write_text(json.dumps(ADAPTERS_AS_RECIPE))
    from_file = mergeforge.run("recipe.yaml", out="from-file")
    assert weights_of(from_file.folder) == weights_of("planned")


def test_iter_run_yields_every_tile(models: Path) -> None:
    plan = mergeforge.plan({"base_model": "base", "adapters": ["adapters/a"]}, out="out", memory="64MiB")
    assert {tile.name for tile in mergeforge.iter_run(plan)} == {tensor.info.name for tensor in plan.tensor_plans}
    assert Path("out/mergeforge.json").is_file()


def test_a_plan_prints_as_a_page(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same lines as `mergeforge plan`, and few of them."""
    plan = mergeforge.plan(ADAPTERS_AS_RECIPE, out="out")
    Path("recipe.yaml").write_text(json.dumps(ADAPTERS_AS_RECIPE))
    assert run_command(["plan", "recipe.yaml", "--out", "out"]) == 0
    printed = capsys.readouterr().out.splitlines()
    page = str(plan).splitlines()
    measured = ("free", "memory ", "to work in")  # these change from one moment to the next
    fixed = [[line for line in lines if not any(word in line for word in measured)] for lines in (page, printed)]
    assert fixed[0] == fixed[1]
    assert len(page) < 40 and len(repr(plan)) < 200


def test_inspect_and_diff(models: Path) -> None:
    assert mergeforge.inspect("base")["kind"] == "checkpoint"
    assert mergeforge.inspect(Path("adapters/a"))["kind"] == "adapter"
    assert all(difference.same for difference in mergeforge.diff("base", "base"))
    assert any(not difference.same for difference in mergeforge.diff("base", "tuned-a"))


def test_convert_to_gguf(models: Path) -> None:
    files = mergeforge.convert_to_gguf("base", ["q8_0", "f16"], out="ggufs")
    assert [file.name for file in files] == ["base-Q8_0.gguf", "base-F16.gguf"] and all(map(Path.is_file, files))
    (single,) = mergeforge.convert_to_gguf("base", "q8_0", out="single.gguf")
    assert single.read_bytes() == files[0].read_bytes()


def test_extract_lora_reproduces_the_tuned_model(models: Path) -> None:
    report = mergeforge.extract_lora("tuned-a", base="base", rank=4, out="extracted")
    assert report["modules"] and Path("extracted/adapter_model.safetensors").is_file()


def test_combine_adapters_is_the_adapter_of_the_merge(models: Path) -> None:
    combined = mergeforge.combine_adapters("base", ["adapters/a", "adapters/b"], weights=[0.6, 0.4], out="combined")
    assert (combined / "adapter_config.json").is_file() and not (combined / "model.safetensors").exists()
    mergeforge.merge(base_model="base", adapters=[combined], dtype="float32", out="through-one")
    mergeforge.merge(
        base_model="base", adapters=["adapters/a", "adapters/b"], weights=[0.6, 0.4], dtype="float32", out="direct"
    )
    changes = [difference.relative for difference in mergeforge.diff("direct", "through-one")]
    assert max(changes) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mergeforge.plan("r.yaml", memry="2GiB"), "plan() has no argument 'memry'; did you mean 'memory'?"),
        (lambda: mergeforge.run("r.yaml", treads=2), "run() has no argument 'treads'; did you mean 'threads'?"),
        (lambda: mergeforge.iter_run("r.yaml", dvice="cpu"), "iter_run() has no argument 'dvice'"),
        (lambda: mergeforge.merge(base_model="base", adapter_s=[]), "merge() has no argument 'adapter_s'"),
        (lambda: mergeforge.convert_to_gguf("base", imatrx="x"), "convert_to_gguf() has no argument 'imatrx'"),
        (lambda: mergeforge.extract_lora("a", base="b", out="c", rnk=8), "extract_lora() has no argument 'rnk'"),
    ],
)
def test_an_unknown_argument_names_the_function_that_was_called(call: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        call()
    assert str(error.value).startswith(f"mergeforge.{message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": 3}, "models must be a list, not int"),
        ({"models": [None]}, "models must be paths or repo ids, not None"),
        ({"adapters": [{"adapter": "a"}]}, "adapters must be paths or repo ids, not {'adapter': 'a'}"),
        ({"weights": 0.5}, "weights must be a list, not float"),
        ({"weights": ["half"]}, "weights must be numbers, not 'half'"),
        ({"parameters": [1]}, "parameters must be a dict, not list"),
        ({"out": 3}, "out must be a path, not int"),
        ({"recipe": "recipe.yaml", "weights": 1}, "weights must be a list, not int"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(arguments: dict[str, Any], message: str, models: Path) -> None:
    with pytest.raises(TypeError) as error:
        mergeforge.merge(**{"base_model": "base", **arguments} if "recipe" not in arguments else arguments)
    assert str(error.value) == f"mergeforge.merge(): {message}"


@pytest.mark.parametrize("recipe", [None, 3])
def test_what_is_no_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(TypeError, match="a recipe is a file, a dict, a list of dicts"):
        mergeforge.run(recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": "2"}, "threads must be a whole number of at least 1, not '2'"),
        ({"memory": "x"}, "memory: 'x' is not a size"),
        ({"sets": "weight"}, "override 'weight': write PATH=VALUE"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_a_wrong_option_is_a_recipe_error_in_the_words_of_both_interfaces(
    options: dict[str, Any], message: str, models: Path
) -> None:
    with pytest.raises(mergeforge.RecipeError) as error:
        mergeforge.plan(ADAPTERS_AS_RECIPE, out="out", **options)
    assert str(error.value).startswith(message) and "--" not in str(error.value)


def test_extract_and_publish_refuse_wrong_values(models: Path) -> None:
    with pytest.raises(mergeforge.RecipeError, match="rank must be a whole number of at least 1, not 'x'"):
        mergeforge.extract_lora("tuned-a", base="base", out="lora", rank="x")
    with pytest.raises(mergeforge.RecipeError, match=r"energy is a fraction .* not 'x'"):
        mergeforge.extract_lora("tuned-a", base="base", out="lora", energy="x")
    with pytest.raises(mergeforge.RecipeError) as error:
        mergeforge.extract_lora("tuned-a", base="base", out="lora")
    assert error.value.hint == "set rank=64, or energy=0.95, or both"
    with pytest.raises(mergeforge.RecipeError, match="gguf must be beside or apart, not 'both'"):
        mergeforge.publish("base", "owner/name", gguf="both")


def test_one_path_may_stand_for_a_list_of_one(models: Path) -> None:
    mergeforge.merge(base_model="base", adapters="adapters/a", out="one")
    mergeforge.merge(base_model="base", adapters=["adapters/a"], sets="dtype=float32", out="two")
    mergeforge.merge(base_model="base", adapters=Path("adapters/a"), dtype="float32", out="three")
    assert weights_of("two") == weights_of("three")
    assert mergeforge.verify("one").ok


def test_hints_speak_python_in_python_and_options_on_the_command_line(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(json.dumps(ADAPTERS_AS_RECIPE))
    with pytest.raises(mergeforge.RecipeError) as error:
        mergeforge.run("recipe.yaml")
    assert "out=DIR" in error.value.hint and "--" not in error.value.hint
    with pytest.raises(mergeforge.RecipeError, match="no output folder"):
        mergeforge.run(mergeforge.plan("recipe.yaml"))
    assert run_command(["run", "recipe.yaml"]) == 2
    assert "--out DIR" in capsys.readouterr().err


def test_every_option_of_run_is_an_argument_of_run() -> None:
    """But for those that say what to print, and mergekit's, which stand for others."""
    module, function, _ = COMMANDS["run"]
    command = getattr(__import__(f"mergeforge.cli.{module}", fromlist=[function]), function)
    assert isinstance(command, click.Command)
    printing = {"as_json", "quiet", "verbose", "plan_only", "recipe", "out_path"}
    names = {
        parameter.name for parameter in command.params if not str(parameter.name).startswith("mergekit_")
    } - printing
    from mergeforge.planner import Options

    own = set(inspect.signature(mergeforge.run).parameters)
    assert names <= own | set(Options.__dataclass_fields__)


def test_torch_keeps_its_number_of_threads(models: Path) -> None:
    import torch

    before = torch.get_num_threads()
    mergeforge.merge(base_model="base", adapters=["adapters/a"], out="out")
    assert torch.get_num_threads() == before


def test_public_names_load_on_first_use() -> None:
    assert all(getattr(mergeforge, name) for name in mergeforge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mergeforge.nothing


def test_dir_lists_the_public_names_only() -> None:
    expected = {"merge", "plan", "run", "iter_run", "verify", "inspect", "diff", "convert_to_gguf", "extract_lora"}
    expected |= {"combine_adapters", "publish", "Recipe", "Plan", "train", "eval"}
    assert expected <= set(dir(mergeforge)) == set(mergeforge.__all__)
