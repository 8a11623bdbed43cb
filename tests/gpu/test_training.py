"""Training on a GPU: the loss falls, within the memory estimate; 4-bit bases, paged optimizers, fp16, fallbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeforge.operations.synthetic_models import ModelShape, write_model
from mergeforge.train.plan import TINY_STD, make_plan
from mergeforge.train.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = ModelShape(512, 1408, 4, 8, 8, 8192)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    base = write_model(tmp_path / "base", SHAPE, std=TINY_STD)
    rows = [{"prompt": f"{a} and {b}", "response": f"{a}{b}" * 8} for a in "abcdefgh" for b in "stuvwxyz"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(base),
        "data": str(tmp_path / "rows.jsonl"),
        "lr": 1e-3,
        "val": 8,
        "output": str(tmp_path / "run"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "fp16"},
        {"method": "lora", "lora": {"dora": True}},
        {"method": "full", "lr": 1e-4},
        {"optimizer": "paged_adamw_8bit"},
        {"memory": {"embed_on_cpu": True, "offload_activations": True, "ce_chunk": 256}},
    ],
    ids=str,
)
def test_the_loss_falls_within_the_memory_estimate(changes: dict[str, Any], settings: dict[str, Any]) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = make_plan(settings | changes, device="cuda")
    trained = train(plan)
    losses = trained.folder.metric_values("loss")
    first, last = losses[0], losses[-1]
    assert last < first and trained.validation_loss is not None and trained.validation_loss < first
    assert trained.peak_memory - before <= plan.resolved.estimate.total


def test_memory_fallbacks_do_not_change_the_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    frugal = {"embed_on_cpu": True, "offload_activations": True, "checkpointing": True, "ce_chunk": 256}
    plain = {"embed_on_cpu": False, "offload_activations": False, "checkpointing": False, "ce_chunk": 0}
    runs = [
        train(make_plan(settings | {"memory": memory, "output": str(tmp_path / name)}, device="cuda"))
        for name, memory in (("frugal", frugal), ("plain", plain))
    ]
    assert runs[0].validation_loss == pytest.approx(runs[1].validation_loss, rel=1e-2)
