"""What README.md and recipes/ promise is run here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fakehub import FakeHub

import mergeforge
from mergeforge.adapters.kinds import KINDS
from mergeforge.adapters.refused import REFUSED
from mergeforge.cli import run_command
from mergeforge.cli.starting import shipped
from mergeforge.methods import METHODS
from mergeforge.train.settings import read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HOW_TO = (ROOT / "recipes" / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


DATA = ("instruct", "documents", "forecast")  # what the README's rows are called, in their order


def commands(page: str, language: str = "sh") -> list[tuple[list[str], set[int]]]:
    """Arguments and the exit codes that they may end with."""
    found = []
    for line in (line.split(" #")[0].strip() for block in blocks(language, page) for line in block.splitlines()):
        if line.startswith("mergeforge "):
            arguments = shlex.split(line.removesuffix("|| true"))[1:]
            codes = {0, 1} if line.endswith("|| true") else {1} if arguments[0] == "diff" else {0}
            found.append((arguments, codes))
    return found


def is_training(recipe: str) -> bool:
    return "data" in yaml.safe_load(recipe)


def test_every_command_of_the_readme_runs(models: Path) -> None:
    assert len(commands(README)) >= 17
    for arguments, codes in commands(README):
        assert run_command(arguments) in codes, arguments


def test_every_command_of_the_how_tos_runs(models: Path) -> None:
    recipe = {"base_model": "base", "adapters": ["adapters/a"], "output": {"path": "merged", "gguf": ["q4_k_m"]}}
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    assert len(commands(HOW_TO)) >= 9
    for arguments, codes in commands(HOW_TO):
        assert run_command(arguments) in codes, arguments


def test_the_how_tos_that_need_a_hub_run_against_one(models: Path) -> None:
    """Merged on the Hub's side, published, downloaded again and verified."""
    first, *rest = [command for command, _ in commands(HOW_TO, "text") if "owner/name" in command]
    assert "--stream-to-hub" in first and [command[0] for command in rest] == ["publish", "publish"]
    recipe = {"base_model": "owner/base", "adapters": ["adapters/a"], "output": {"path": "merged", "gguf": ["f16"]}}
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    download = "from huggingface_hub import snapshot_download; snapshot_download('owner/name', local_dir='again')"
    with FakeHub() as hub:
        hub.add_repo("owner/base", {path.name: path.read_bytes() for path in Path("base").iterdir()})
        env = {**os.environ, **hub.env(), "HF_HOME": str(models / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

        def call(*arguments: str) -> None:
            done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr

        call("-m", "mergeforge", *first)
        shutil.rmtree("merged")
        call("-m", "mergeforge", "run", "merge.yaml", "-q")
        call("-m", "mergeforge", "eval", "merged", "--data", "sample:chat", "--limit", "2", "--card", "-q")
        for command in rest:
            call("-m", "mergeforge", *command)
        call("-c", download)
        call("-m", "mergeforge", "verify", "again")
    published = {path.name for path in Path("merged").iterdir() if not path.name.startswith(".")}
    assert {path.name for path in Path("again").iterdir() if not path.name.startswith(".")} >= published
    assert "| sample:chat | 2 |" in Path("again/README.md").read_text()


def test_ci_runs_the_set_up_and_test_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    setup, tests = (
        line for block in blocks("sh") for line in block.splitlines() if line.startswith((".venv", "python3"))
    )
    assert setup in script and tests in script


@pytest.mark.parametrize("text", [block for block in blocks("yaml") if not is_training(block)])
def test_recipes_of_the_readme_run(text: str, models: Path) -> None:
    assert mergeforge.merge(yaml.safe_load(text), out="out").is_dir()


@pytest.mark.parametrize("text", [block for block in blocks("yaml") if is_training(block)])
def test_trainings_of_the_readme_run(text: str, models: Path) -> None:
    for name, rows in zip(DATA, blocks("json"), strict=True):
        Path(f"{name}.jsonl").write_text(rows)
    Path("train.yaml").write_text(text)
    assert run_command(["train", "train.yaml", "-q", "--set", "max_steps=2"]) == 0
    assert Path("runs/train/adapter/adapter_model.safetensors").is_file()


def test_training_from_python_runs(models: Path) -> None:
    exec(next(block for block in blocks("python") if "QuickTrainer" in block), {})
    assert Path("runs/tiny-chat/adapter").is_dir() and Path("runs/steps/adapter").is_dir()


def test_python_of_the_readme_runs(models: Path) -> None:
    (models / "recipe.yaml").write_text(shipped()["fold_one"].read_text())
    for name in ("a", "b"):
        (models / "adapters" / name).rename(models / name)
    code = next(block for block in blocks("python") if "mergeforge.merge" in block)
    exec(code, {})
    assert Path("merged/mergeforge.json").exists() and Path("averaged/mergeforge.json").exists()


def test_every_method_stands_in_the_readme() -> None:
    assert [name for name in METHODS if f"`{name}`" not in README] == []


def test_every_adapter_kind_stands_in_the_readme() -> None:
    assert [name for name in [*KINDS, *REFUSED] if f"`{name}`" not in README] == []


def test_shipped_trainings_are_read() -> None:
    trainings = [path for name, path in shipped().items() if name.startswith("train-")]
    assert len(trainings) == 6
    for path in trainings:
        assert path.read_text().startswith("# Training: ")
        read(path)


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith("train-")])
def test_shipped_recipes_run(name: str, models: Path) -> None:
    recipe = shipped()[name]
    assert recipe.read_text().startswith("# ")
    assert run_command(["plan", str(recipe)]) == 0
    assert run_command(["run", str(recipe), "-q", "--out", "out"]) == 0
    assert run_command(["verify", "out", "--deep"]) == 0


def test_init_and_recipes_copy(models: Path) -> None:
    assert run_command(["recipes", "cp", "ties"]) == 0
    assert Path("ties.yaml").read_text() == shipped()["ties"].read_text()
    assert run_command(["init", "--template", "slerp", "ties.yaml"]) == 5  # never over a file
