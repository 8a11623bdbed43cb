"""Peak resident memory of real processes, compared with --memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mergeforge
from mergeforge.methods import METHODS
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


def recipe_of(root: Path, method: str) -> dict[str, object]:
    """A merge of two models, or of one and the base, into ROOT/METHOD."""
    per_model = {"weight": 0.5, "density": 0.5}
    known = METHODS[method].parameters
    parameters = {name: value for name, value in per_model.items() if name in known}
    seeds = (1,) if METHODS[method].base_is_input else (1, 2)
    models = [{"model": str(root / f"tuned-{seed}"), "parameters": parameters} for seed in seeds]
    recipe: dict[str, object] = {"merge_method": method, "models": models, "output": {"path": str(root / method)}}
    recipe["parameters"] = {name: value for name, value in {"t": 0.4, "select_topk": 0.5}.items() if name in known}
    return recipe | ({"base_model": str(root / "base")} if METHODS[method].needs_base else {})


@pytest.mark.needs_kernels
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "breadcrumbs", "dare_ties", "della", "sce"])
def test_merges_from_files_take_no_more_than_the_plan_says(root: Path, method: str) -> None:
    """They use neither torch nor staging space for the inputs."""
    recipe = recipe_of(root, method)
    planned = mergeforge.plan(recipe, threads=2, device="cpu").peak
    path = root / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    merging = peak("-m", "mergeforge", "run", str(path), "--device", "cpu", "--threads", "2")
    assert merging - peak("-c", "import numpy, rich, click") < planned + OWN


@pytest.mark.parametrize("method", ["fold", "fp8", "ram", "arcee_fusion"])
def test_peak_stays_within_the_memory_limit(root: Path, method: str) -> None:
    """Merges that torch computes."""
    output = {"path": str(root / method), "fp8": method == "fp8"}
    adapters = {"base_model": str(root / "base"), "adapters": [str(root / "adapter")]}
    recipe = adapters if method in ("fold", "fp8") else recipe_of(root, method)
    (root / f"{method}.yaml").write_text(yaml.safe_dump(recipe | {"output": output}))
    alone = peak("-c", "import torch, rich, click")
    merging = peak("-m", "mergeforge", "run", str(root / f"{method}.yaml"), "--memory", "64MiB", "--device", "cpu")
    assert merging - alone < (64 << 20) + MARGIN


@pytest.mark.needs_kernels
def test_merges_without_statistics_need_memory_only_for_output_tiles(root: Path) -> None:
    plan = mergeforge.plan(recipe_of(root, "linear"), threads=2, device="cpu")
    assert plan.peak < 2 * (FROM_FILES_NBYTES + READ_NBYTES) + (1 << 20)


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    ("name", "method", "output"), [("numpy", "ties", {}), ("torch", "fold", {}), ("gguf", "fold", {"gguf": ["q8_0"]})]
)
def test_the_process_takes_no_more_than_the_plan_says(
    root: Path, name: str, method: str, output: dict[str, object]
) -> None:
    """The real peak of `run`, against the total that `plan --json` gives; the promise is no more than 120 MB above."""
    adapters = {"base_model": str(root / "base"), "adapters": [str(root / "adapter")]}
    recipe = recipe_of(root, method) if method != "fold" else adapters
    path = root / f"process-{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output": {**output, "path": str(root / name)}}))
    options = ("--device", "cpu", "--threads", "2", "--memory", "64MiB")
    command = [sys.executable, "-m", "mergeforge", "plan", str(path), "--json", *options]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    total = planned["process_memory"]
    assert total - (120 << 20) < peak("-m", "mergeforge", "run", str(path), *options) <= total
