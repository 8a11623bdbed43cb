"""What pip installs: the sdist, the wheel built from it, and the commands of an installation far from the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.native_library import extension
from support.paths import RECIPES, ROOT

from mergeforge import errors

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NATIVE = ROOT / "mergeforge" / "native"
LIBRARY = "mergeforge/native/_kernels.abi3.so"
NOT_COPIED = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so", "mergeforge-demo")
TEXTS = [ROOT / "pyproject.toml", ROOT / "Dockerfile", *sorted(ROOT.glob("*.md"))]
TEXTS += [
    path
    for folder in ("mergeforge", "recipes", "benchmarks", "tests", "tools", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix in ("", ".py", ".md", ".toml", ".yaml", ".ipynb") and path != Path(__file__)
]


@dataclass(frozen=True)
class Built:
    """A built sdist and wheel."""

    sdist: Path
    wheel: Path

    @property
    def files(self) -> set[str]:
        """The names of the wheel's files."""
        return set(zipfile.ZipFile(self.wheel).namelist())


def build(folder: Path, **variables: str) -> Built:
    """Build a copy of the checkout: first the sdist, then the wheel from the sdist."""
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder / "source", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return Built(sdist, wheel)


def installed(wheel: Path, folder: Path) -> Path:
    """A new environment's bin/ with the wheel installed; the dependencies are those of this environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin"


def run(*command: str | Path, **variables: str) -> str:
    """What a command prints; it must succeed. Nothing of this checkout is on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def built_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("without"), CC="/bin/false")


@pytest.mark.slow
def test_the_sdist_holds_the_c_source_and_what_the_gate_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for kind in ("c", "h") for path in NATIVE.glob(f"*.{kind}")]
    needed = [*sources, *RECIPES.iterdir(), *(ROOT / "tools").iterdir(), ROOT / "pyproject.toml", Path(__file__)]
    assert {str(path.relative_to(ROOT)) for path in needed if path.is_file()} <= files


@pytest.mark.slow
def test_the_wheel_holds_the_library_recipes_samples_and_no_source(built: Built) -> None:
    assert built.wheel.name.startswith(f"mergeforge-{PROJECT['version']}-cp311-abi3-")
    recipes = {f"mergeforge/recipe/shipped/{path.name}" for path in RECIPES.glob("*.yaml")}
    samples = {str(path.relative_to(ROOT)) for path in (ROOT / "mergeforge/data/samples").iterdir()}
    modules = {
        str(path.relative_to(ROOT)) for kind in ("py", "pyi") for path in (ROOT / "mergeforge").rglob(f"*.{kind}")
    }
    assert {LIBRARY, "mergeforge/py.typed", *recipes, *samples, *modules} <= built.files
    assert not [name for name in built.files if name.endswith((".c", ".h")) or name.startswith(("tests", "recipes"))]
    assert built.wheel.stat().st_size < 3 << 20


@pytest.mark.slow
def test_an_installed_wheel_runs_far_from_the_checkout(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """demo, recipes, doctor, and a check of the library that needs numpy only."""
    bin = installed(built.wheel, tmp_path / "venv")
    monkeypatch.chdir(tmp_path)
    where = run(bin / "python", "-c", "import mergeforge; print(mergeforge.__file__)")
    assert where.startswith(str(tmp_path / "venv"))
    assert "right sums" in run(bin / "python", ROOT / "tools" / "check_wheel")
    run(bin / "mergeforge", "demo")
    names = [line.split()[0] for line in run(bin / "mergeforge", "recipes", "ls").splitlines()]
    assert names == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert json.loads(run(bin / "mergeforge", "doctor", "--json"))["C library"] == "merges and quantizes"
    run(bin / "mergeforge", "init", "--template", "quickstart", "recipe.yaml")
    run(bin / "mergeforge", "run", "recipe.yaml", "-q")


@pytest.mark.slow
def test_a_wheel_in_a_folder_of_its_own_finds_the_recipes(built: Built, tmp_path: Path) -> None:
    """pip install --target."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "here"]
    run(*pip, built.wheel)
    shown = run(sys.executable, "-m", "mergeforge", "recipes", "show", "ties", PYTHONPATH=str(tmp_path / "here"))
    assert shown == (RECIPES / "ties.yaml").read_text()


@pytest.mark.slow
def test_without_a_compiler_the_wheel_installs_and_the_plan_says_so(
    built_without_compiler: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files but the library; demo merges with torch."""
    assert LIBRARY not in built_without_compiler.files
    bin = installed(built_without_compiler.wheel, tmp_path / "venv")
    monkeypatch.chdir(tmp_path)
    run(bin / "mergeforge", "demo")
    Path("recipe.yaml").write_text("merge_method: linear\nmodels: [mergeforge-demo/base, mergeforge-demo/merged]\n")
    page = run(bin / "mergeforge", "plan", "recipe.yaml", "--out", "out", "--set", "parameters.weight=0.5")
    missing = "torch merges, more slowly: the C library is missing; install a C compiler, then install mergeforge again"
    assert f"note     {missing}" in page.splitlines()


def test_every_c_file_is_compiled_and_every_header_rebuilds_the_library() -> None:
    """The table in pyproject.toml against the folder, and against what the sources include."""
    sources = {path.name for path in NATIVE.glob("*.c")}
    assert {Path(name).name for name in extension()["sources"]} == sources
    files, included = [NATIVE / name for name in sources], set()
    while files:
        new = set(re.findall(r'#include "(\w+\.h)"', files.pop().read_text())) - included
        files += [NATIVE / name for name in new]
        included |= new
    assert included <= {Path(name).name for name in extension()["depends"]}


def test_nothing_sends_a_user_to_an_index_that_does_not_have_the_project() -> None:
    """mergeforge is installed from a checkout: `pip install -e ".[train]"`."""
    wrong = re.compile(r"pip install [^\n&;#`]*\bmergeforge(\[|\b(?![-/.]))|pypi\.org/project/mergeforge")
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path in TEXTS for match in wrong.finditer(path.read_text())]
    assert len(TEXTS) > 500 and not found
    assert not PROJECT.get("urls")


def minimum_versions(requirements: list[str]) -> dict[str, str]:
    """Package -> the version after >=."""
    parsed = [Requirement(requirement) for requirement in requirements]
    bounds = {each.name: [bound.version for bound in each.specifier if bound.operator == ">="] for each in parsed}
    return {name: versions[0] for name, versions in bounds.items() if versions}


OPTIONAL = [minimum_versions(requirements) for requirements in PROJECT["optional-dependencies"].values()]


def test_hints_and_pages_name_the_versions_of_pyproject() -> None:
    """Every package of an extra: what errors tell to install, and every `pip install` that a page or module prints."""
    expected = {name: version for extra in OPTIONAL for name, version in extra.items()}
    for extra in OPTIONAL:
        assert extra.items() <= expected.items()
    assert errors.MINIMUM_VERSIONS.items() <= expected.items()
    commands = [command for path in TEXTS for command in re.findall(r"pip install (.*)", path.read_text())]
    named = [pair for command in commands for pair in re.findall(r"([\w-]+)>=([\w.]+)", command)]
    assert len(named) >= 5
    assert [pair for pair in named if Version(expected.get(*pair)) != Version(pair[1])] == []


def test_every_package_that_a_hint_names_has_its_minimum_version() -> None:
    assert errors.pip_install("peft", "mlflow") == 'pip install "peft>=0.19" mlflow'
    source = "\n".join(path.read_text() for path in (ROOT / "mergeforge").rglob("*.py"))
    assert not re.findall(r"MissingExtraError\([^\n]*hint=f?['\"]pip install (?!the package)", source)


def test_the_python_versions_agree() -> None:
    """requires-python, the classifiers, the ABI of the wheel, its build, the tools' targets and the README."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    tag = oldest.replace(".", "")
    listed = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert min(listed, key=lambda version: int(version.split(".")[1])) == oldest
    assert table["distutils"]["bdist_wheel"]["py-limited-api"] == f"cp{tag}"
    assert table["cibuildwheel"]["build"] == f"cp{tag}-*" and table["ruff"]["target-version"] == f"py{tag}"
    assert f"0x{int(tag[0]):02X}{int(tag[1:]):02X}0000" in (NATIVE / "module.c").read_text()
    assert f"Python {oldest} or later" in (ROOT / "README.md").read_text()
