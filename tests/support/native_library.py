"""The C library compiled apart from the package: with another compiler, for another system, or with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.paths import PACKAGE, ROOT, TESTS

WARNINGS = ("-Wall", "-Wextra", "-Werror")
# what runs the kernels on all kinds of inputs and compares them with torch and ggml
TESTS_OF_KERNELS = ("native", "tensors/test_native_inputs.py", "methods/test_native_equals_torch.py", "gguf/quantize")


def extension() -> dict[str, Any]:
    """The C library's table in pyproject.toml: sources, extra-compile-args and so on."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    return table


def compile_objects(compiler: Sequence[str], folder: Path, more: Iterable[str] = (), less: Iterable[str] = ()) -> None:
    """Compile every C file of the library into `folder`, with pyproject's flags, `more` of them, and without `less`.

    Warnings are errors. Raises CalledProcessError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in extension()["extra-compile-args"] if flag not in less]
    for source in extension()["sources"]:
        out = folder / Path(source).with_suffix(".o").name
        include = ["-isystem", sysconfig.get_path("include")]
        command = [*compiler, *flags, *WARNINGS, *more, "-fPIC", *include, "-c", source, "-o", str(out)]
        subprocess.run(command, cwd=ROOT, check=True)


def package_with(compiler: Sequence[str], objects: Path, folder: Path) -> None:
    """Copy the package into `folder` with a library linked from the objects in place of its own."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.[ch]")  # a library older than its source is refused
    shutil.copytree(PACKAGE, folder / "mergeforge", ignore=ignored)
    library = folder / "mergeforge" / "native" / "_kernels.abi3.so"
    subprocess.run([*compiler, "-shared", *map(str, objects.glob("*.o")), "-lm", "-o", str(library)], check=True)


def run_tests(folder: Path, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
    """Run the tests of kernels with the package in `folder`. Raises CalledProcessError."""
    found = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "MERGEFORGE_REQUIRE_NATIVE": "1"}
    environment = {**environment, **found}
    where = "import mergeforge.native._kernels as kernels; print(kernels.__file__)"
    library = subprocess.run([sys.executable, "-c", where], env=environment, stdout=subprocess.PIPE, check=True)
    assert library.stdout.decode().startswith(str(folder)), library.stdout
    tests = [str(TESTS / name) for name in TESTS_OF_KERNELS]
    subprocess.run([sys.executable, "-m", "pytest", *tests, *arguments], cwd=ROOT, env=environment, check=True)
