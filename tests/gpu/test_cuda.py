"""Merges on a GPU against the same merges on the CPU: a bounded difference, within the memory limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergeforge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TUNED = [{"model": f"tuned-{name}", "parameters": {"weight": 0.5}} for name in "ab"]
RECIPES: dict[str, dict[str, Any]] = {
    "fold": {"base_model": "base", "adapters": ["adapters/a", {"adapter": "adapters/b", "weight": 0.3}]},
    "linear": {"merge_method": "linear", "models": TUNED},
    "slerp": {"merge_method": "slerp", "base_model": "tuned-a", "models": ["tuned-b"], "parameters": {"t": 0.3}},
    "ties": {"merge_method": "ties", "base_model": "base", "models": TUNED, "parameters": {"density": 0.5}},
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "models": TUNED, "parameters": {"density": 0.5}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_cuda_and_cpu_agree_within_one_bfloat16_rounding(name: str, models: Path) -> None:
    for device in ("cpu", "cuda"):
        mergeforge.merge(RECIPES[name], out=device, device=device)
    cpu, cuda = (load_file(f"{device}/model.safetensors") for device in ("cpu", "cuda"))
    for tensor in cpu:
        torch.testing.assert_close(cuda[tensor], cpu[tensor], rtol=2**-7, atol=1e-6)
        assert (cuda[tensor] != cpu[tensor]).float().mean() < 0.01


def test_cuda_bytes_do_not_depend_on_memory_or_threads(models: Path) -> None:
    for threads, memory in ((1, "64MiB"), (4, "512MiB")):
        mergeforge.merge(RECIPES["ties"], out=f"out{threads}", device="cuda", threads=threads, memory=memory)
    first, second = (Path(f"out{threads}/model.safetensors").read_bytes() for threads in (1, 4))
    assert first == second


def test_device_memory_stays_within_the_budget(models: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    mergeforge.merge(RECIPES["ties"], out="out", device="cuda", memory="128MiB")
    assert torch.cuda.max_memory_allocated() < 128 << 20
