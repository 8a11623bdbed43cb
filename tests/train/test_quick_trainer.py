"""Training from Python with QuickTrainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import mergeforge


def test_three_lines_train_an_adapter(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = mergeforge.QuickTrainer("sample:tiny", "sample:chat", max_steps=2, eval={"max_tokens": 4}).train()
    assert trained.result == Path("runs/tiny-chat/adapter")
    assert load_file(trained.result / "adapter_model.safetensors")
    assert re.search(r"step 2 of 2: loss \d", capfd.readouterr().err)


def test_trains_on_python_rows_and_merges(settings: dict[str, Any], here: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(8)]
    trainer = mergeforge.QuickTrainer(settings["model"], rows, method="lora", eval={"max_tokens": 4}, output="q", val=2)
    plan = trainer.plan()
    assert plan.data.counts.used == 8 and plan.resolved.setup.lora.r == 16
    lines: list[Any] = []
    trained = trainer.train(listeners=[lines.append])
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, trained.steps + 1))
    result = trainer.merge(gguf=["q8_0"])
    assert result.merged and [path.name for path in result.ggufs] == ["merged-Q8_0.gguf"]
    assert result.losses["original"] == pytest.approx(result.losses["adapter"], abs=1e-2)


def test_the_former_name_of_post_training_still_works() -> None:
    from mergeforge import train

    assert train.follow is train.run_post_training
