"""Training from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import mergeforge


def test_three_lines(here: Path) -> None:
    found = mergeforge.QuickTrainer("sample:tiny", "sample:chat", max_steps=2, eval={"max_tokens": 4}).train()
    assert found.result == Path("runs/tiny-chat/adapter") and load_file(found.result / "adapter_model.safetensors")


def test_rows_of_python_and_the_steps_behind_it(settings: dict[str, Any], here: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(8)]
    trainer = mergeforge.QuickTrainer(settings["model"], rows, method="lora", eval={"max_tokens": 4}, output="q", val=2)
    plan = trainer.plan()
    assert plan.data.counts.used == 8 and plan.choices.way.lora.r == 16
    seen: list[Any] = []
    trained = trainer.train(listeners=[seen.append])
    assert [line["step"] for line in seen if "loss" in line] == list(range(1, trained.steps + 1))
    followed = trainer.merge(gguf=["q8_0"])
    assert followed.merged and [path.name for path in followed.ggufs] == ["merged-Q8_0.gguf"]
    assert abs(followed.losses["original"] - followed.losses["adapter"]) < 1e-2
