"""Slices, stacks and several documents through mergekit 0.1.5 and through mergeforge: every tensor, and the config.

mergekit gets the documents one after the other, with the folders of earlier results for their names
(mergekit-multi of 0.1.5 fails on some of these). `dtype: float32`, so that both compute alike.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.peers import peer_program
from test_against_mergekit import BY_KIND

import mergeforge
from mergeforge.operations.synthetic_models import SHAPES, write_model

pytestmark = pytest.mark.peers

DRIVER = """
import json, logging, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

logging.disable(logging.CRITICAL)
options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
for job in json.load(sys.stdin):
    run_merge(MergeConfiguration.model_validate(job["recipe"]), job["out"], options)
"""


def piece(name: str, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    source: dict[str, Any] = {"model": name, "layer_range": [first, stop]}
    return source | ({"parameters": parameters} if parameters else {})


def stacked(method: str, *slices: list[dict[str, Any]] | dict[str, Any], **keys: Any) -> dict[str, Any]:
    written = [one if isinstance(one, dict) else {"sources": one} for one in slices]
    return {"merge_method": method, "dtype": "float32", "slices": written, **keys}


def whole(method: str, models: list[str] | list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    written = [one if isinstance(one, dict) else {"model": one} for one in models]
    return {"merge_method": method, "dtype": "float32", "models": written, **keys}


STACKS: dict[str, Any] = {
    "frankenmerge": stacked("passthrough", [piece("a", 0, 3)], [piece("b", 1, 4)]),
    "one layer twice": stacked("passthrough", [piece("a", 0, 2)], [piece("a", 1, 2, scale=0.5)], [piece("a", 2, 4)]),
    "embeddings from the first, head from the last": stacked("passthrough", [piece("c", 3, 4)], [piece("b", 0, 1)]),
    "gradient slerp": stacked(
        "slerp", [piece("base", 0, 4), piece("a", 0, 4)], base_model="base", parameters={"t": BY_KIND}
    ),
    "two slices, two methods' parameters": stacked(
        "linear",
        [piece("a", 0, 2, weight=[0.1, 0.9]), piece("b", 2, 4, weight=0.4)],
        {"sources": [piece("b", 0, 3), piece("c", 1, 4)], "parameters": {"weight": [0.3, 1, 0.2]}},
        parameters={"weight": 0.7, "normalize": True},
    ),
    "filters by the layer's own name": stacked(
        "linear",
        [
            piece("a", 1, 3, weight=[{"filter": "layers.2.mlp", "value": 3}, {"value": 1}]),
            piece("b", 0, 2, weight=1),
        ],
    ),
    "ties in slices": stacked(
        "ties",
        [piece("base", 0, 2), piece("a", 0, 2, weight=1, density=0.999), piece("b", 0, 2, weight=0.5)],
        [piece("base", 2, 4), piece("b", 2, 4, weight=[0.2, 0.6]), piece("c", 1, 3, weight=1)],
        base_model="base",
        parameters={"density": 1.0, "int8_mask": True},
    ),
    "a slice with a base of its own": stacked(
        "task_arithmetic",
        [piece("base", 0, 2), piece("a", 0, 2, weight=0.4)],
        {"sources": [piece("c", 2, 4), piece("b", 2, 4, weight=0.7)], "base_model": "c"},
        base_model="base",
    ),
    "a slice of one layer": stacked(
        "linear", [piece("a", 3, 4, weight=[0.1, 0.9]), piece("b", 3, 4, weight=[0.7, 0.2])], parameters={}
    ),
    "module": {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"weight": 0.1},
        "modules": {
            "default": {
                "slices": [{"sources": [piece("a", 0, 3), piece("b", 1, 4, weight=2)]}],
                "parameters": {"weight": 0.5},
            }
        },
    },
}
SEVERAL: dict[str, list[dict[str, Any]]] = {
    "results as models": [
        whole("linear", ["a", "b"], parameters={"weight": 0.5}, name="first-merge"),
        whole("slerp", ["c"], base_model="first-merge", parameters={"t": 0.5}, name="second-merge"),
        whole(
            "dare_ties",
            [
                {"model": "second-merge", "parameters": {"density": 1.0, "weight": 0.5}},
                {"model": "b", "parameters": {"density": 1.0, "weight": 0.5}},
            ],
            base_model="base",
        ),
    ],
    "a stack of results": [
        whole("task_arithmetic", ["a", "b"], base_model="base", parameters={"weight": 0.6}, name="tuned"),
        stacked("passthrough", [piece("tuned", 0, 3)], [piece("c", 2, 4)], name="deep"),
        stacked("linear", [piece("deep", 1, 4), piece("tuned", 0, 3)], parameters={"weight": [0.1, 1]}),
    ],
}


class Both:
    """Every recipe's result from both programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed, name in enumerate(("base", "a", "b", "c")):
            write_model(folder / name, SHAPES["tiny"], seed=seed, near=0 if seed else None, dtype="F32")

    def write(self) -> list[dict[str, Any]]:
        """The recipes as files; the jobs that mergekit is to do."""
        jobs = []
        for name, value in {**STACKS, **SEVERAL}.items():
            documents = [self._placed(one, {}) for one in (value if isinstance(value, list) else [value])]
            self._file(name).write_text(yaml.safe_dump_all(documents, sort_keys=False))
            results = {one["name"]: f"{self._out(name)} {one['name']}" for one in documents if "name" in one}
            for one in documents:
                out = results.get(one.pop("name", ""), str(self._out(name)))
                jobs.append({"recipe": self._placed(one, results), "out": out})
        return jobs

    def run_mergekit(self, python: Path) -> None:
        jobs = self.write()
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        command = [str(python), "-c", DRIVER]
        done = subprocess.run(
            command, input=json.dumps(jobs), text=True, capture_output=True, env=environment, check=False, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def ours(self, name: str, **options: Any) -> Path:
        return mergeforge.merge(self._file(name), out=self.folder / f"ours {name}", device="cpu", **options)

    def theirs(self, name: str) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        out = self._out(name)
        return load_file(next(out.glob("*.safetensors"))), json.loads((out / "config.json").read_text())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.yml"

    def _out(self, name: str) -> Path:
        return self.folder / f"theirs {name}"

    def _placed(self, value: Any, results: Mapping[str, str]) -> Any:
        """The recipe with whole paths for the models, and for the names of results."""
        if isinstance(value, list):
            return [self._placed(item, results) for item in value]
        if not isinstance(value, dict):
            return value
        places = {name: str(self.folder / name) for name in ("base", "a", "b", "c")} | dict(results)
        return {
            key: places.get(item, item) if key in ("model", "base_model") else self._placed(item, results)
            for key, item in value.items()
        }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    python = peer_program()
    made = Both(tmp_path_factory.mktemp("stacks"))
    made.run_mergekit(python)
    return made


@pytest.mark.parametrize("name", [*STACKS, *SEVERAL])
def test_slices_match_mergekit_in_every_tensor_and_depth(both: Both, name: str) -> None:
    theirs, config = both.theirs(name)
    out = both.ours(name)
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == config["num_hidden_layers"]


def test_layer_stack_writes_no_intermediate_files(both: Both) -> None:
    """Documents whose results are used leave nothing behind."""
    out = both.ours("a stack of results", overwrite=True)
    before = set(both.folder.rglob("*"))
    assert both.ours("a stack of results", overwrite=True) == out
    assert set(both.folder.rglob("*")) == before
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
