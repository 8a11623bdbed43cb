"""`mergeforge merge`: a merge without a recipe file is the merge of the recipe that it prints."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from support.paths import ROOT

from mergeforge.cli import run_command
from mergeforge.methods import METHODS

ADAPTERS = ("--adapter", "adapters/a:0.6", "--adapter", "adapters/b:0.4")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The recipe that the command prints."""
    assert run_command(["merge", *arguments, "--print-recipe"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_prints_the_recipe_of_its_options(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--method", "ties", "--density", "0.5", "--no-normalize", "--dtype", "bfloat16", "--gguf", "q8_0")
    assert printed(capsys, "--base", "base", *ADAPTERS, *options, "-o", "out", "--set", "random_seed=3") == {
        "merge_method": "ties",
        "base_model": "base",
        "adapters": [{"adapter": "adapters/a", "weight": 0.6}, {"adapter": "adapters/b", "weight": 0.4}],
        "parameters": {"density": 0.5, "normalize": False},
        "dtype": "bfloat16",
        "output": {"path": "out", "gguf": ["q8_0"]},
        "random_seed": 3,
    }
    assert list(Path().glob("out*")) == []


def test_merges_what_the_printed_recipe_merges(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*ADAPTERS, "--method", "ties", "--density", "0.5", "-q"]
    Path("recipe.yaml").write_text(yaml.safe_dump(printed(capsys, *options)))
    assert run_command(["merge", *options, "--out", "direct", "--gguf", "q8_0"]) == 0
    assert run_command(["run", "recipe.yaml", "by-recipe", "-q"]) == 0
    assert Path("direct/model.safetensors").read_bytes() == Path("by-recipe/model.safetensors").read_bytes()
    assert Path("direct/direct-Q8_0.gguf").exists()


def test_models_are_merged_as_in_a_recipe(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "base", "--model", "tuned-a", "--base", "base", "--method", "slerp", "--t", "[0, 0.5]")
    assert printed(capsys, *options) == {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "tuned-a"}],
        "parameters": {"t": [0, 0.5]},
    }
    assert run_command(["merge", *options, "-o", "out", "-q"]) == 0
    assert run_command(["merge", "--model", "tuned-a:2", "--model", "tuned-b", "--method", "linear", "-o", "two"]) == 0
    a, b, mean = (load_file(f"{name}/model.safetensors")["model.norm.weight"] for name in ("tuned-a", "tuned-b", "two"))
    assert ((2 * a.double() + b.double()) / 3).to(mean.dtype).equal(mean)


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1:0.5", "org/name@v1", 0.5),
        ("org/name:-1e-1", "org/name", -0.1),
        ("a:.5", "a", 0.5),
        (r"C:\models\a", r"C:\models\a", None),
        (r"C:\models\a:0.25", r"C:\models\a", 0.25),
        ("hf://org/name:2", "hf://org/name", 2.0),
        ("https://host:8080", "https://host:8080", None),
        ("https://host:8080/a:0.5", "https://host:8080/a", 0.5),
        ("a:0.2,0.8", "a", [0.2, 0.8]),
        ("with:5", "with:5", None),
        ("with:5:0.5", "with:5", 0.5),
    ],
)
def test_a_weight_follows_the_last_colon(
    text: str,
    name: str,
    weight: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("with:5").mkdir()
    (adapter,) = printed(capsys, "--base", "b", "--adapter", text)["adapters"]
    assert adapter == {"adapter": name, "weight": 1.0 if weight is None else weight}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "base"], "nothing to merge"),
        (["--model", "base"], "models need --method"),
        (["--adapter", "adapters/a:half"], "'half' is not a weight"),
        (["--adapter", "adapters/a"], "no output folder is given"),
        (["--adapter", "adapters/a", "--method", "tise"], "did you mean 'ties'?"),
        (
            ["--adapter", "adapters/a", "--density", "0.5", "--method", "ties", "--densty", "1"],
            "did you mean --density?",
        ),
        (["--adapter", "adapters/a", "--quantize", "q8_0"], "did you mean --gguf?"),
    ],
)
def test_mistakes_say_what_to_do(
    models: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["merge", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_parameter_of_a_method_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for name in METHODS:
        for parameter in METHODS[name].parameters.values():
            if parameter.name not in ("weight", "int8_mask"):
                option = f"--{parameter.name.replace('_', '-')}"
                given = [option] if parameter.kind == "bool" else [option, "0.5"]
                recipe = printed(capsys, "--base", "b", "--adapter", "a", "--adapter", "c", "--method", name, *given)
                assert recipe["parameters"] == {parameter.name: True if parameter.kind == "bool" else 0.5}


def test_the_base_comes_from_adapter_config_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe as run names the base, so the result can be verified where the adapters are gone."""
    assert run_command(["merge", *ADAPTERS, "-o", "out"]) == 0
    assert "base_model: base, from adapter_config.json of adapters/a" in capsys.readouterr().err
    assert run_command(["merge", "--base", "base", *ADAPTERS, "-o", "same", "-q"]) == 0
    assert Path("out/model.safetensors").read_bytes() == Path("same/model.safetensors").read_bytes()
    assert yaml.safe_load(Path("out/mergeforge.yml").read_text())["base_model"] == "base"
    assert run_command(["verify", "out", "--deep"]) == 0


def rename_base(adapter: str, base: str | None) -> None:
    path = Path("adapters", adapter, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_adapters_that_name_no_base_or_different_ones_are_refused(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rename_base("a", "tuned-a")
    assert run_command(["merge", *ADAPTERS, "-o", "out"]) == 2
    text = capsys.readouterr().err
    assert "different base models: adapters/a on tuned-a; adapters/b on base" in text and "--base MODEL" in text
    rename_base("b", None)
    assert run_command(["merge", *ADAPTERS, "-o", "out", "-q"]) == 0
    rename_base("a", None)
    assert run_command(["merge", *ADAPTERS, "-o", "other"]) == 2
    assert "no adapter_config.json names a base model" in capsys.readouterr().err
    rename_base("a", "./moved")
    assert run_command(["merge", *ADAPTERS, "-o", "other"]) == 3
    assert "adapters/a was trained on ./moved, but there is no ./moved" in capsys.readouterr().err


def test_a_model_among_the_adapters_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["merge", "--base", "base", "--adapter", "tuned-a", "-o", "out"]) == 3
    assert "tuned-a is a whole model, not an adapter" in capsys.readouterr().err


def test_plan_needs_no_output_folder(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["merge", *ADAPTERS, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("fold -> (no output folder given)")
    Path("recipe.yaml").write_text("adapters: [adapters/a]")
    assert run_command(["plan", "recipe.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] is None


def test_errors_are_wrapped_between_words_on_a_terminal(models: Path) -> None:
    """On a terminal of 80 columns."""
    command = [sys.executable, "-m", "mergeforge", "merge", "--adapter", "adapters/a", "--method", "zzz", "-o", "out"]
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, stderr=theirs, env=environment, timeout=60).returncode == 2
    os.close(theirs)
    shown = re.sub(r"\x1b\[[0-9]*m", "", os.read(ours, 1 << 16).decode())
    os.close(ours)
    lines = shown.splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 80
    assert "unknown merge method 'zzz'" in shown and "task_arithmetic" in re.split(r"[,\s]+", shown)
