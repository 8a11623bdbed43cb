"""Peak resident memory of an extract-lora process, compared with --memory; more memory gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MARGIN = 90 << 20  # headers, Python's and torch's own growth, malloc
NAMES = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(2) for name in ("up", "down")]

# A small process in between: the system counts a parent's memory as its child's.
LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(*command: str) -> int:
    """Peak resident memory in bytes of `python COMMAND`."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four matrices of 22 M numbers each: their float32 difference is 90 MB."""
    root, generator = tmp_path_factory.mktemp("extracting"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(8192, 2752, generator=generator).mul_(0.02).bfloat16() for name in NAMES}
    base |= {name: base[name].t().contiguous() for name in NAMES if "down" in name}
    for name in ("base", "tuned"):
        (root / name).mkdir()
        save_file(base, root / name / "model.safetensors")
        base = {
            key: (value.float() + torch.randn(1, value.shape[1]).mul_(1e-3)).bfloat16() for key, value in base.items()
        }
    return root


@pytest.mark.parametrize("options", [["--rank", "32"], ["--rank", "32", "--dtype", "bfloat16", "--threads", "1"]])
def test_peak_stays_within_the_memory_limit(root: Path, tmp_path: Path, options: list[str]) -> None:
    alone = peak("-c", "import torch, rich, click, yaml, huggingface_hub")
    command = ["-m", "mergeforge", "extract-lora", str(root / "tuned"), "--base", str(root / "base"), "--device", "cpu"]
    limited = peak(*command, "--memory", "64MiB", "--out", str(tmp_path / "little"), *options)
    assert limited - alone < (64 << 20) + MARGIN
    peak(*command, "--memory", "1GiB", "--out", str(tmp_path / "much"), *options)
    little, much = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("little", "much"))
    assert little == much
