"""A tiny base and a little data that every training test uses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub
from support.faults.warm import Warm
from support.training_runs import run

from mergeforge.operations.synthetic_models import write_model
from mergeforge.train.plan import TINY_STD, ModelShape
from mergeforge.train.run import Trained

SHAPE = ModelShape(64, 176, 2, 4, 2, 320)
COLORS = ("red", "blue", "green", "black", "white", "grey", "pink")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; tests only read it."""
    return write_model(tmp_path_factory.mktemp("train") / "base", SHAPE, std=TINY_STD)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_settings(folder: Path, base: Path) -> dict[str, Any]:
    """Settings of a run of ten steps on 40 rows, LoRA in float32; writes the rows into the folder."""
    pairs = [(first, second) for first in COLORS for second in COLORS if first != second][:40]
    rows = [{"prompt": f"Join {first} and {second}.", "response": f"{first}-{second}"} for first, second in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(base),
        "data": str(folder / "rows.jsonl"),
        "method": "lora",
        "lora": {"r": 4},
        "lr": 3e-3,
        "epochs": 1,
        "batch": {"size": 4, "micro": 2},
        "pack": False,
        "eval": {"max_tokens": 4},
        "output": str(folder / "run"),
    }


@pytest.fixture
def settings(here: Path, base: Path) -> dict[str, Any]:
    """Settings of a run of ten steps on 40 rows, LoRA in float32."""
    return write_settings(here, base)


@pytest.fixture
def preferences(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of ten steps on 40 pairs; answers join two words with a dash or with a space."""
    pairs = list(itertools.permutations(COLORS, 2))[:40]
    rows = [
        {
            "prompt": f"Join {first} and {second}.",
            "chosen": f"{first}-{second}",
            "rejected": f"{first} {second} {first}",
        }
        for first, second in pairs
    ]
    write_rows(Path(settings["data"]), rows)
    return settings | {"objective": "dpo"}


@pytest.fixture
def labels(preferences: dict[str, Any]) -> dict[str, Any]:
    """The same as labeled answers, for KTO."""
    path = Path(preferences["data"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    labeled = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row, name in zip(rows, itertools.cycle(("chosen", "rejected")), strict=False)
    ]
    write_rows(path, labeled)
    return preferences | {"objective": "kto"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def finished_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run with `settings`; tests only read it."""
    return run(write_settings(tmp_path_factory.mktemp("finished"), base))


@pytest.fixture(scope="session")
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def warm(base: Path, fake_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs mergeforge commands in processes of their own that use the fake Hub, without importing torch each time."""
    folder = tmp_path_factory.mktemp("warm")
    settings = write_settings(folder, base) | {"method": "qlora", "max_steps": 1, "val": 4, "after": {"merge": True}}
    (folder / "train.yaml").write_text(json.dumps(settings))
    with Warm(**fake_hub.env(), HF_HOME=str(tmp_path_factory.mktemp("hub-home"))) as server:
        ended = server.learn(["train", "train.yaml", "-q"], folder)
        assert ended.code == 0, ended.err
        yield server
