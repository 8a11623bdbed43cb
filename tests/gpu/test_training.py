"""Training on a CUDA card: it learns, within the estimate; 4-bit bases, paged optimizers, fp16, memory given up."""

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
    "changed",
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
def test_it_learns_within_the_estimate(changed: dict[str, Any], settings: dict[str, Any]) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = make_plan(settings | changed, device="cuda")
    trained = train(plan)
    losses = [json.loads(line) for line in trained.folder.metrics.read_text().splitlines()]
    first, last = (next(one["loss"] for one in order if "loss" in one) for order in (losses, losses[::-1]))
    assert last < first and trained.validation_loss is not None and trained.validation_loss < first
    assert trained.peak_memory - before <= plan.resolved.estimate.total


def test_things_given_up_for_memory_change_no_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    given_up = {"embed_on_cpu": True, "offload_activations": True, "checkpointing": True, "ce_chunk": 256}
    plain = {"embed_on_cpu": False, "offload_activations": False, "checkpointing": False, "ce_chunk": 0}
    found = [
        train(make_plan(settings | {"memory": memory, "output": str(tmp_path / name)}, device="cuda"))
        for name, memory in (("one", given_up), ("two", plain))
    ]
    assert found[0].validation_loss == pytest.approx(found[1].validation_loss, rel=1e-2)
