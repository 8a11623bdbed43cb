"""Peak resident memory of real processes, compared with --memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mergeforge.operations.synthetic_models import ModelShape, write_adapter, write_model
from mergeforge.planner.tiling import FROM_FILES_NBYTES
from mergeforge.tensors.native_inputs import READ_NBYTES

SHAPE = ModelShape(1024, 2816, 6, 8, 8, 32000)  # 127 M parameters; an embedding of 64 MB in bfloat16
OWN = 30 << 20  # mergeforge's modules, headers, malloc
MARGIN = 90 << 20  # headers, Python's and torch's own growth, malloc


# A small process in between: the system counts the memory of a parent as that of its child.
LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(*command: str) -> int:
    """Peak resident memory in bytes of `python COMMAND`."""
    process = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True
    )
    return int(process.stdout) * 1024


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    write_model(root / "base", SHAPE, seed=0)
    for seed in (1, 2):
        write_model(root / f"tuned-{seed}", SHAPE, seed=seed, near=0)
    write_adapter(root / "adapter", SHAPE, "base", rank=16)
    return root


@pytest.mark.needs_kernels
def test_merges_from_files_need_memory_only_for_output_tiles(root: Path) -> None:
    """They use neither torch nor staging space for the inputs."""
    models = [{"model": str(root / f"tuned-{seed}"), "parameters": {"weight": 0.5}} for seed in (1, 2)]
    recipe = {"merge_method": "linear", "models": models, "output": {"path": str(root / "sum")}}
    (root / "sum.yaml").write_text(yaml.safe_dump(recipe))
    merging = peak("-m", "mergeforge", "run", str(root / "sum.yaml"), "--device", "cpu", "--threads", "2")
    assert merging - peak("-c", "import numpy, rich, click") < 2 * (FROM_FILES_NBYTES + READ_NBYTES) + OWN


@pytest.mark.parametrize("method", ["fold", "fp8", "ties", "dare_ties", "slerp"])
def test_peak_stays_within_the_memory_limit(root: Path, method: str) -> None:
    output = {"path": str(root / method), "fp8": method == "fp8"}
    recipe: dict[str, object] = {"base_model": str(root / "base"), "output": output}
    if method in ("fold", "fp8"):
        recipe["adapters"] = [str(root / "adapter")]
    else:
        parameters = {} if method == "slerp" else {"weight": 1.0, "density": 0.5}
        seeds = (1,) if method == "slerp" else (1, 2)
        recipe["models"] = [{"model": str(root / f"tuned-{seed}"), "parameters": parameters} for seed in seeds]
        recipe |= {"merge_method": method, "parameters": {"t": 0.4} if method == "slerp" else {}}
    (root / f"{method}.yaml").write_text(yaml.safe_dump(recipe))
    alone = peak("-c", "import torch, rich, click")
    merging = peak("-m", "mergeforge", "run", str(root / f"{method}.yaml"), "--memory", "64MiB", "--device", "cpu")
    assert merging - alone < (64 << 20) + MARGIN
