"""The commands as a user types them, run in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge.cli import COMMANDS, run_command

RECIPE = {"base_model": "base", "adapters": [{"adapter": "adapters/a", "weight": 0.5}], "output": {"path": "merged"}}


@pytest.fixture
def recipe(models: Path) -> str:
    (models / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return "recipe.yaml"


def test_run_writes_what_the_contract_lists(recipe: str, models: Path) -> None:
    assert run_command(["run", recipe]) == 0
    expected = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in Path("merged").iterdir()} == expected | {
        "README.md",
        "mergeforge.yml",
        "mergeforge.json",
    }


def test_run_prints_json_on_stdout_and_the_rest_on_stderr(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", recipe, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == "merged" and facts["files"] == ["model.safetensors"]
    assert facts["warnings"] == [] and facts["peak_memory"] > facts["bytes"]


def test_quiet_prints_nothing(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", recipe, "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_finished_merge_is_replaced_only_when_asked(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", recipe, "-q"]) == 0
    assert run_command(["run", recipe, "-q"]) == 5
    assert "--overwrite" in capsys.readouterr().err
    assert run_command(["run", recipe, "-q", "--overwrite"]) == 0


def test_set_and_out_override_the_recipe(recipe: str) -> None:
    assert run_command(["run", recipe, "-q", "--set", "adapters.0.weight=0", "--out", "other"]) == 0
    assert load_file("other/model.safetensors").keys() == load_file("base/model.safetensors").keys()
    assert run_command(["diff", "base", "other"]) == 0


def test_plan_shows_inputs_operations_bytes_memory_disk_and_writes_nothing(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plan", recipe]) == 0
    text = capsys.readouterr().out
    for part in ("base", "adapters/a", "base + LoRA", "copied", "reads", "writes", "memory", "disk"):
        assert part in text
    assert not Path("merged").exists()


def test_plan_json_names_every_tensor(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", recipe, "--plan", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"].keys() == load_file("base/model.safetensors").keys()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "absent.yaml"], 2, "there is no recipe"),
        (["run", "recipe.yaml", "--set", "adapters.0.wieght=1"], 2, "did you mean 'weight'"),
        (["run", "recipe.yaml", "--set", "base_model=./absent"], 3, "there is no ./absent"),
        (["run", "recipe.yaml", "--memory", "lots"], 2, "not a size"),
        (["run", "recipe.yaml", "--memory", "1MiB"], 4, "at least 16MiB"),
        (["run", "recipe.yaml", "--device", "gpu"], 2, "unknown device"),
        (["run", "recipe.yaml", "--threads", "0"], 2, "at least 1"),
        (["run", "recipe.yaml", "--out", "base"], 5, "input"),
        (["rum"], 2, "did you mean 'run'"),
        (["verify", "base"], 3, "no receipt"),
        (["inspect", "absent/"], 3, "there is no"),
        (["recipes", "show", "tise"], 2, "did you mean 'ties'"),
    ],
)
def test_mistakes_have_their_exit_code_and_say_what_to_do(
    recipe: str, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == code
    assert said in capsys.readouterr().err


def test_verify_finds_a_flipped_byte_a_missing_file_and_an_edited_config(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["run", recipe, "-q"]) == 0
    assert run_command(["verify", "merged"]) == 0
    weights = Path("merged/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    Path("merged/tokenizer.json").unlink()
    with Path("merged/config.json").open("a") as file:
        file.write(" ")
    assert run_command(["verify", "merged"]) == 3
    text = capsys.readouterr().err
    assert "model.norm.weight is damaged" in text and "tokenizer.json is missing" in text and "config.json has" in text


def test_verify_of_an_interrupted_merge_says_how_to_resume(
    recipe: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = mergeforge.iter_run(recipe, threads=1, device="cpu")
    next(tiles)
    tiles.close()  # type: ignore[attr-defined]  # a generator
    assert run_command(["verify", "merged"]) == 3
    text = capsys.readouterr().err
    assert "interrupted merge (fold)" in text and "again to resume" in text and "no receipt" not in text


def test_deep_verify_finds_an_input_that_changed(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", recipe, "-q"]) == 0
    assert run_command(["verify", "merged", "--deep"]) == 0
    tensors = load_file("base/model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, "base/model.safetensors")
    assert run_command(["verify", "merged", "--deep"]) == 3
    assert "comes out differently" in capsys.readouterr().err


def test_diff_shows_missing_tensors_shapes_dtypes_and_values(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file("base/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:10].clone()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 2
    tensors["extra"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, "tuned-a/model.safetensors")
    assert run_command(["diff", "base", "tuned-a"]) == 1
    text = capsys.readouterr().out
    for part in (
        "dtype BF16 and F32",
        "shape [320, 64] and [10, 64]",
        "1 of 1  model.embed_tokens.weight",
        "extra: only in tuned-a",
        "up_proj.weight: only in base",
    ):
        assert part in text


def test_inspect_shows_kind_tensors_and_config(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", "base", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "checkpoint" and facts["config"]["hidden_size"] == 64
    assert run_command(["inspect", "adapters/a", "-v"]) == 0
    text = capsys.readouterr().out
    assert "adapter adapters/a" in text and "lora_alpha: 32" in text and "lora_A.weight" in text


def test_demo_merges_and_verifies_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["demo", str(tmp_path / "demo")]) == 0
    assert "tensors verified" in capsys.readouterr().out
    assert run_command(["demo", str(tmp_path / "demo")]) == 0  # again: replaces its own result


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """Subcommands too; the examples name the command, and stand under "Examples:"."""
    subcommands = {"data": ("preview", "stats", "split", "build"), "recipes": ("ls", "show", "cp")}
    names = [[name] for name in COMMANDS] + [[group, name] for group, inner in subcommands.items() for name in inner]
    for words in names:
        assert run_command([*words, "--help"]) == 0
        examples = capsys.readouterr().out.partition("Examples:")[2]
        assert f"mergeforge {' '.join(words)}" in examples, words


def test_a_command_is_in_the_file_of_its_name() -> None:
    for name, (module, _, _) in COMMANDS.items():
        assert module == name.replace("-", "_")


@pytest.mark.parametrize("arguments", [["--help"], ["list", "methods"], ["schema"], ["run", "bad.yaml"]])
def test_answers_quickly_without_torch(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("merge_methd: ties\n")
    code = f"import sys, mergeforge.cli as cli; cli.run_command({arguments!r}); sys.exit('torch' in sys.modules)"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert time.perf_counter() - started < 2.0  # under 0.5 s on a quiet machine: benchmarks/start.py
