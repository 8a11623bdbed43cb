"""Run the commands, recipes and code of README.md, recipes/README.md and recipes/*.yaml."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fake_hub import FakeHub

import mergeforge
from mergeforge.adapters.peft.kind import PEFT_METHODS
from mergeforge.adapters.peft.unsupported import UNSUPPORTED
from mergeforge.cli import run_command
from mergeforge.cli.recipes import shipped_recipes
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.methods import METHODS
from mergeforge.train.settings import read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HOW_TO = (ROOT / "recipes" / "README.md").read_text()


PAGES = README + HOW_TO
DATA = ("instruct", "pairs", "documents", "forecast")  # file names of the training rows in PAGES, in order


def blocks(language: str, page: str = PAGES) -> list[str]:
    """The contents of all fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(page: str, language: str = "sh") -> list[tuple[list[str], set[int]]]:
    """The `mergeforge` commands of a page: arguments and allowed exit codes."""
    found = []
    for line in (line.split(" #")[0].strip() for block in blocks(language, page) for line in block.splitlines()):
        if line.startswith("mergeforge "):
            arguments = shlex.split(line.removesuffix("|| true"))[1:]
            codes = {0, 1} if line.endswith("|| true") else {1} if arguments[0] == "diff" else {0}
            found.append((arguments, codes))
    return found


def is_training(recipe: str) -> bool:
    return "data" in yaml.safe_load(recipe)


@pytest.fixture(scope="module")
def _after_set_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readme")
    set_up = blocks("sh", README)[0].strip()
    assert set_up.endswith(" && .venv/bin/mergeforge demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run_command(["demo"]) == 0
    return root


@pytest.fixture
def after_set_up(_after_set_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder as the README's set-up command leaves it: it was empty, and holds only what `demo` wrote."""
    root = tmp_path / "readme"
    shutil.copytree(_after_set_up, root, copy_function=shutil.copy2)
    monkeypatch.chdir(root)
    return root


def test_every_command_of_the_readme_runs_in_the_order_printed(after_set_up: Path) -> None:
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
        line for block in blocks("sh", README) for line in block.splitlines() if line.startswith((".venv", "python3"))
    )
    assert setup in script and tests in script


@pytest.mark.parametrize("text", [block for block in blocks("yaml") if not is_training(block)])
def test_recipes_of_both_pages_run(text: str, models: Path) -> None:
    assert mergeforge.merge(yaml.safe_load(text), out="out").is_dir()


@pytest.mark.parametrize("text", [block for block in blocks("yaml") if is_training(block)])
def test_trainings_of_both_pages_run(text: str, models: Path) -> None:
    for name, rows in zip(DATA, blocks("json"), strict=True):
        Path(f"{name}.jsonl").write_text(rows)
    Path("train.yaml").write_text(text)
    assert run_command(["train", "train.yaml", "-q", "--set", "max_steps=2"]) == 0
    assert Path("runs/train/adapter/adapter_model.safetensors").is_file()


def test_training_from_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(next(block for block in blocks("python", README) if "QuickTrainer" in block), {})
    assert Path("runs/tiny-chat/adapter").is_dir() and Path("runs/steps/adapter").is_dir()


def test_python_of_the_readme_runs(after_set_up: Path) -> None:
    """In the folder of the README's first page: its recipe.yaml, and what `demo` wrote."""
    assert run_command(next(arguments for arguments, _ in commands(README) if arguments[0] == "init")) == 0
    names: dict[str, Any] = {}
    exec(next(block for block in blocks("python", README) if "mergeforge.merge" in block), names)
    result = names["result"]
    assert (result.folder / "mergeforge.json").is_file() and result.files and result.peak > 0
    assert isinstance(len(result.warnings), int)
    assert Path("averaged/mergeforge.json").is_file() and Path("averaged/averaged-Q4_K_M.gguf").is_file()


def test_every_python_name_of_the_readme_exists() -> None:
    names = set(re.findall(r"\bmergeforge\.([A-Za-z_]+)", README)) - {"json", "yml"}
    assert len(names) >= 14
    for name in sorted(names):
        assert hasattr(mergeforge, name) or importlib.util.find_spec(f"mergeforge.{name}"), name


def test_every_method_is_documented() -> None:
    assert [name for name in METHODS if f"`{name}`" not in HOW_TO] == []


def test_every_adapter_kind_is_documented() -> None:
    assert [name for name in [*PEFT_METHODS, *UNSUPPORTED] if f"`{name}`" not in HOW_TO] == []


def test_every_gguf_type_is_documented() -> None:
    assert [name for name in FILE_TYPES if f"`{name}`" not in HOW_TO] == []


def test_every_shipped_recipe_is_named_in_the_readme() -> None:
    merges = [name for name in shipped_recipes() if not name.startswith("train-")]
    assert [name for name in merges if not re.search(rf"`{name}`|recipes show {name}`", README)] == []


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Links to files of the repository, and to headings as GitHub names their anchors."""
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings], target


def test_shipped_trainings_are_read() -> None:
    trainings = [path for name, path in shipped_recipes().items() if name.startswith("train-")]
    assert len(trainings) == 7
    for path in trainings:
        assert path.read_text().startswith("# Training: ")
        read(path)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.startswith("train-")])
def test_shipped_recipes_run(name: str, models: Path) -> None:
    recipe = shipped_recipes()[name]
    assert recipe.read_text().startswith("# ")
    assert run_command(["plan", str(recipe)]) == 0
    assert run_command(["run", str(recipe), "-q", "--out", "out"]) == 0
    assert run_command(["verify", "out", "--deep"]) == 0


def test_init_and_recipes_copy(models: Path) -> None:
    assert run_command(["recipes", "cp", "ties"]) == 0
    assert Path("ties.yaml").read_text() == shipped_recipes()["ties"].read_text()
    assert run_command(["init", "--template", "slerp", "ties.yaml"]) == 5  # never over a file
