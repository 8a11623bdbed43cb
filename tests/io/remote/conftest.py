"""A fake Hub with two models and an adapter, and the same merge from local files for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_hub import FakeHub
from support.hub_machine import SHAPE, Machine, merge_of, weights

import mergeforge
from mergeforge.operations.synthetic_models import write_adapter, write_model


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_model(root / "base", SHAPE, seed=0)
    write_model(root / "tuned", SHAPE, seed=1, near=0)
    write_adapter(root / "loan", SHAPE, "base", rank=8, seed=2)
    return root


@pytest.fixture(scope="session")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the merge with local inputs."""
    names = (str(inputs / name) for name in ("base", "tuned", "loan"))
    return weights(mergeforge.merge(merge_of(*names), out=tmp_path_factory.mktemp("expected") / "out"))


@pytest.fixture
def hub(inputs: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        for folder in inputs.iterdir():
            hub.add_repo(f"org/{folder.name}", {path.name: path.read_bytes() for path in folder.iterdir()})
        yield hub


@pytest.fixture
def machine(hub: FakeHub, tmp_path: Path) -> Machine:
    return Machine(hub, tmp_path)


@pytest.fixture
def recipe(machine: Machine) -> str:
    """A recipe: merge org/base with org/loan folded in, and org/tuned."""
    return machine.recipe("recipe", **merge_of("org/base", "org/tuned", "org/loan"))
