"""Models and adapters that most tests use, made once; and what happens to tests of C kernels where there are none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mergeforge.native import bindings
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

pytest_plugins = ["support.peft_lab"]
TINY = SHAPES["tiny"]
ADAPTERS = {"loan": 4, "underwriting": 8, "fraud": 2, "a": 4, "b": 8, "legal": 4, "style": 4}
REQUIRE_NATIVE = "MERGEFORGE_REQUIRE_NATIVE"  # set to 1: tests fail, instead of being skipped, without the kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vector-width", type=int, metavar="N", help="limit kernels to 0: baseline, 1: AVX2, 2: AVX-512")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"needs_kernels: skipped where there is no C library; with {REQUIRE_NATIVE}=1 it fails"
    )
    limit = config.getoption("--vector-width")
    if limit is not None:
        bindings.kernels().vector_width(limit)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_kernels") is None or bindings.is_available():
        return
    if os.environ.get(REQUIRE_NATIVE) == "1":
        pytest.fail(f"{REQUIRE_NATIVE}=1, but the C library {bindings.why_unavailable()}")
    pytest.skip(f"the C library {bindings.why_unavailable()}")


@pytest.fixture(scope="session")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "base", TINY, seed=0)
    write_model(root / "tuned-a", TINY, seed=1, near=0)
    write_model(root / "tuned-b", TINY, seed=2, near=0)
    for seed, (name, rank) in enumerate(ADAPTERS.items(), start=1):
        write_adapter(root / "adapters" / name, TINY, "base", rank=rank, seed=seed)
    shutil.copytree(root / "base", root / "mergeforge-demo" / "base")
    shutil.copytree(root / "adapters" / "loan", root / "mergeforge-demo" / "loan")
    return root


@pytest.fixture
def models(_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, as current folder: base, tuned-a, tuned-b and adapters/NAME, all tiny Llamas."""
    root = tmp_path / "models"
    shutil.copytree(_models, root, copy_function=shutil.copy2)
    monkeypatch.chdir(root)
    return root
