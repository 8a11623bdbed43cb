"""Tiny models for evaluation, created once: a random one, an adapter for it, and one that was taught to answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import make_adapter, teach

import mergeforge
from mergeforge.operations.synthetic_models import SHAPES, write_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama in float32, without a chat template."""
    return write_model(tmp_path_factory.mktemp("evaluating") / "base", SHAPES["tiny"], dtype="F32")


@pytest.fixture(scope="session")
def adapter(base: Path) -> Path:
    """A LoRA adapter for `base` by PEFT, with both factors random."""
    return make_adapter(base, base.parent / "adapter")


@pytest.fixture(scope="session")
def merged(base: Path, adapter: Path) -> Path:
    """The adapter merged into its base, with GGUF files beside it."""
    recipe: dict[str, Any] = {"base_model": str(base), "adapters": [str(adapter)]}
    return mergeforge.merge(recipe | {"output": {"gguf": ["f32", "f16"], "name": "m"}}, out=base.parent / "merged")


@pytest.fixture(scope="session")
def taught(base: Path) -> Path:
    """The tiny Llama, taught the four answers to the smoke test's prompts, with a chat template and a GGUF."""
    folder = base.parent / "taught"
    teach(base, folder)
    mergeforge.merge(
        {"merge_method": "passthrough", "models": [str(folder)], "output": {"gguf": ["f32"], "name": "taught"}},
        out=base.parent / "taught-gguf",
    )
    return folder


@pytest.fixture(scope="session")
def taught_gguf(taught: Path) -> Path:
    return taught.parent / "taught-gguf" / "taught-F32.gguf"


@pytest.fixture(scope="session")
def questions(base: Path) -> Path:
    """Forty rows of prompt and response."""
    path = base.parent / "questions.jsonl"
    rows = [
        {"prompt": f"the hen number {at}", "response": f"There are {at * 7} hens. né" * (1 + at % 3)}
        for at in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path
