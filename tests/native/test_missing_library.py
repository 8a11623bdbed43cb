"""The package without the C library, as pip installs it where there is no C compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import PACKAGE, ROOT, TESTS

import mergeforge

SAID = "the C library is missing; install a C compiler, then install mergeforge again"
NOTE = f"torch merges, more slowly: {SAID}"
MERGE = {"merge_method": "linear", "models": ["tuned-a", "tuned-b"], "parameters": {"weight": 0.5}}
FOLD = {"base_model": "base", "adapters": ["adapters/a"]}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables under which a copy of the package without the library is imported."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, folder / "mergeforge", ignore=shutil.ignore_patterns("__pycache__", "_kernels*"))
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def run(environment: dict[str, str], *command: str, code: int = 0) -> str:
    """What `python -m command` prints."""
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_plan_says_in_one_line_that_it_is_missing(models: Path, environment: dict[str, str]) -> None:
    """The page, its JSON and the run; the receipt and the card are about the model, not about the machine."""
    Path("merge.json").write_text(json.dumps(MERGE))
    page = run(environment, "mergeforge", "plan", "merge.json", "--out", "out").splitlines()
    assert [line for line in page if "C library" in line] == [f"note     {NOTE}"]
    assert json.loads(run(environment, "mergeforge", "plan", "merge.json", "--out", "out", "--json"))["notes"] == [NOTE]
    assert f"note     {NOTE}" in run(environment, "mergeforge", "run", "merge.json", "--out", "out")
    assert "C library" not in Path("out/README.md").read_text() + Path("out/mergeforge.json").read_text()


def test_a_printed_plan_says_it_too(models: Path, environment: dict[str, str]) -> None:
    code = f"import mergeforge; print(mergeforge.plan({MERGE}, out='out', device='cpu'))"
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"note     {NOTE}" in printed.stdout.splitlines()


def test_the_plan_says_it_only_where_the_library_would_help(models: Path, environment: dict[str, str]) -> None:
    """torch folds adapters and converts to F16, with or without the library."""
    Path("fold.json").write_text(json.dumps(FOLD))
    plan = ("mergeforge", "plan", "fold.json", "--out", "out", "--device", "cpu", "--set")
    assert "C library" not in run(environment, *plan, "output.gguf=[f16]")
    assert f"note     torch quantizes, more slowly: {SAID}" in run(environment, *plan, "output.gguf=[f16, q4_0]")
    both = {**MERGE, "output": {"gguf": ["q8_0"]}}
    Path("both.json").write_text(json.dumps(both))
    page = run(environment, "mergeforge", "plan", "both.json", "--out", "out")
    assert f"note     torch merges and quantizes, more slowly: {SAID}" in page


@pytest.mark.needs_kernels
def test_the_plan_says_nothing_where_there_is_a_library(models: Path) -> None:
    assert "C library" not in str(mergeforge.plan({**MERGE, "output": {"gguf": ["q8_0"]}}, out="out", device="cpu"))


def test_doctor_says_that_it_is_missing(environment: dict[str, str], tmp_path: Path) -> None:
    report = json.loads(run(environment, "mergeforge", "doctor", "--folder", str(tmp_path), "--json"))
    said = SAID.removeprefix("the C library ")
    assert report["C library"] == f"not in use, so torch merges and quantizes, more slowly: it {said}"


@pytest.mark.parametrize(("required", "code", "said"), [("1", 1, "1 error"), ("", 0, "1 skipped")])
def test_tests_of_the_library_fail_only_where_it_is_required(
    environment: dict[str, str], required: str, code: int, said: str
) -> None:
    test = f"{TESTS}/native/test_border.py::test_the_arguments_that_the_others_are_made_from_are_right"
    settings = {**environment, "MERGEFORGE_REQUIRE_NATIVE": required}
    printed = run(settings, "pytest", test, f"--rootdir={ROOT}", "-rs", "-p", "no:cacheprovider", code=code)
    assert said in printed and SAID in printed
