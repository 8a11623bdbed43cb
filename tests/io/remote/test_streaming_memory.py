"""Peak resident memory of real streaming processes, compared with --memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_hub import FakeHub
from support.hub_machine import Machine

from mergeforge.operations.synthetic_models import ModelShape, write_adapter, write_model

WIDE = ModelShape(1024, 2816, 2, 8, 8, 32000)  # 180 MB; an embedding of 64 MB in bfloat16
MARGIN = 90 << 20  # headers, Python's and torch's own growth, malloc, an HTTP client
# A small process in between: the system counts the memory of a parent as that of its child.
LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(machine: Machine, *command: str) -> int:
    """Peak resident memory in bytes of `python COMMAND`."""
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *command]
    process = subprocess.run(launcher, capture_output=True, text=True, env=machine.env, timeout=200)
    assert process.returncode == 0, process.stderr
    return int(process.stdout) * 1024


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wide")
    write_model(root / "base", WIDE, seed=0)
    write_adapter(root / "loan", WIDE, "base", rank=16)
    return root


@pytest.fixture(scope="module")
def machine(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with FakeHub() as hub:
        for folder in wide.iterdir():
            hub.add_repo(f"org/{folder.name}", {path.name: path.read_bytes() for path in folder.iterdir()})
        yield Machine(hub, tmp_path_factory.mktemp("machine"))


@pytest.mark.parametrize("where", ["org", pytest.param("file://", marks=pytest.mark.slow)])
def test_peak_stays_within_the_memory_limit(machine: Machine, wide: Path, tmp_path: Path, where: str) -> None:
    root = where + str(wide) if where == "file://" else where
    output = {"shard_size": "40MB", "publish": {"repo": f"fake/{where.strip(':/')}", "stream": True}}
    recipe = {"base_model": f"{root}/base", "adapters": [f"{root}/loan"], "output": output, "stream_inputs": True}
    alone = peak(machine, "-c", "import torch, rich, click, huggingface_hub")
    options = ("--memory", "64MiB", "--device", "cpu", "--out", str(tmp_path / "out"))
    merging = peak(machine, "-m", "mergeforge", "run", machine.recipe(where.strip(":/"), **recipe), *options)
    assert merging - alone < (64 << 20) + MARGIN
