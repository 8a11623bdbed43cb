"""A tiny base and a little data that every training test uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergeforge.operations.synthetic_models import write_model
from mergeforge.train.plan import TINY_STD, ModelShape

SHAPE = ModelShape(64, 176, 2, 4, 2, 320)
COLOURS = ("red", "blue", "green", "black", "white", "grey", "pink")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@pytest.fixture(scope="session")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("train") / "base", SHAPE, std=TINY_STD)


@pytest.fixture
def here(_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def settings(here: Path, _base: Path) -> dict[str, Any]:
    """A run of a few steps on 40 rows, LoRA in float32."""
    rows = [{"prompt": f"Join {a} and {b}.", "response": f"{a}-{b}"} for a in COLOURS for b in COLOURS if a != b][:40]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(_base),
        "data": str(here / "rows.jsonl"),
        "method": "lora",
        "lora": {"r": 4},
        "lr": 3e-3,
        "epochs": 1,
        "batch": {"size": 4, "micro": 2},
        "pack": False,
        "eval": {"max_tokens": 4},
        "output": str(here / "run"),
    }
