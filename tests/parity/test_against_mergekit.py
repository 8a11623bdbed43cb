"""The same YAML through mergekit 0.1.5 and through mergeforge: every element of every tensor.

All recipes run in one mergekit process: its imports take seconds. `dtype: float32`, so that both
compute alike. Models are tiny Llamas; the bfloat16 ones have task vectors full of equal magnitudes.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import mergeforge
from mergeforge.errors import RecipeError
from mergeforge.random_model import SHAPES, write_model
from mergeforge.recipe.settings import layer_positions, value_at

pytestmark = pytest.mark.peers

Tensors = Mapping[str, torch.Tensor]
EPSILON = 2.0**-23

DRIVER = """
import json, logging, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

logging.disable(logging.CRITICAL)
options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, random_seed=1)
errors = {}
for job in json.load(sys.stdin):
    try:
        with open(job["recipe"]) as file:
            config = MergeConfiguration.model_validate(yaml.safe_load(file))
        run_merge(config, job["out"], options)
    except Exception as error:
        errors[job["name"]] = f"{type(error).__name__}: {error}"
json.dump(errors, open(sys.argv[1], "w"))
"""


def model(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "parameters": parameters} if parameters else {"model": name}


def recipe(method: str, *models: dict[str, Any], base: str | None = None, **parameters: Any) -> dict[str, Any]:
    value: dict[str, Any] = {"merge_method": method, "dtype": "float32", "models": list(models)}
    if base:
        value["base_model"] = base
    if parameters:
        value["parameters"] = {name.rstrip("_"): setting for name, setting in parameters.items()}
    return value


BY_KIND = [
    {"filter": "self_attn", "value": [0.0, 0.5, 0.3, 0.7, 1.0]},
    {"filter": "mlp", "value": [1.0, 0.5, 0.7, 0.3, 0.0]},
    {"value": 0.5},
]

LINEAR = {
    "linear two": recipe("linear", model("a", weight=0.3), model("b", weight=0.9)),
    "linear three": recipe("linear", model("a", weight=0.3), model("b", weight=0.9), model("c", weight=-0.4)),
    "linear sum": recipe("linear", model("a", weight=0.3), model("b", weight=0.9), normalize=False),
    "linear sum of three": recipe(
        "linear", model("a", weight=0.1), model("b", weight=0.7), model("c", weight=1.3), normalize=False
    ),
    "linear gradients": recipe("linear", model("a", weight=[0, 0.3, 1]), model("b", weight=[1.0, 0.2])),
    "linear filters": recipe(
        "linear", model("a", weight=BY_KIND), model("b", weight={"filter": "mlp", "value": 0.3}), weight=0.7
    ),
    "linear shared weight": recipe("linear", model("a"), model("b"), model("c"), weight=[0.2, 0.9]),
    "linear exponent": recipe("linear", model("a", weight="1e-1"), model("b", weight=1)),
    "linear flags": recipe("linear", model("a", weight=0.5), model("b", weight=0.9), normalize=[True, False]),
    "linear numbers as flags": recipe("linear", model("a", weight=0.5), model("b", weight=0.9), normalize=[0, 1]),
    "linear base listed": recipe(
        "linear", model("a", weight=0.5), model("base", weight=2), model("b", weight=0.9), base="base"
    ),
    "linear base not listed": recipe("linear", model("a", weight=0.5), model("b"), base="base", weight=0.9),
    "passthrough": recipe("passthrough", model("a")),
    "passthrough scale": recipe("passthrough", model("a", scale=0.3)),
    "passthrough filters": recipe("passthrough", model("a", scale=[{"filter": "o_proj", "value": [0.1, 1.7]}])),
}
SLERP = {
    "slerp near": recipe("slerp", model("base"), model("a"), base="base", t=0.3),
    "slerp far": recipe("slerp", model("base"), model("far"), base="base", t=0.3),
    "slerp readme": recipe("slerp", model("base"), model("far"), base="base", t=BY_KIND),
    "slerp readme near": recipe("slerp", model("base"), model("a"), base="base", t=BY_KIND),
    "slerp base last": recipe("slerp", model("far"), model("base"), base="base", t=0.2),
    "slerp base not listed": recipe("slerp", model("far"), base="base", t=0.2),
}
TASK = {
    "task_arithmetic": recipe("task_arithmetic", model("a", weight=0.3), model("b", weight=0.9), base="base"),
    "task_arithmetic normalize": recipe(
        "task_arithmetic",
        model("a", weight=0.3),
        model("b", weight=0.8),
        model("c", weight=0.5),
        base="base",
        normalize=True,
    ),
    "task_arithmetic lambda": recipe(
        "task_arithmetic", model("a", weight=0.3), model("b", weight=-0.8), base="base", lambda_=0.7
    ),
    "task_arithmetic cancelling": recipe(
        "task_arithmetic", model("a", weight=0.5), model("b", weight=-0.5), base="base", normalize=True
    ),
    "task_arithmetic gradients": recipe(
        "task_arithmetic", model("a", weight=BY_KIND), model("b", weight=[0.1, 0.9]), base="base", lambda_=[0.5, 1.5]
    ),
    "task_arithmetic base listed": recipe(
        "task_arithmetic", model("base", weight=9), model("a", weight=0.3), model("b", weight=0.9), base="base"
    ),
    "dare_linear all": recipe("dare_linear", model("a", weight=0.3), model("b", weight=0.9, density=1), base="base"),
    "dare_ties all": recipe(
        "dare_ties", model("a", weight=0.3), model("b", weight=0.9), model("c", weight=1), base="base"
    ),
    "dare_ties all normalize": recipe(
        "dare_ties", model("a", weight=0.3), model("b", weight=0.9), base="base", normalize=True, lambda_=1.3
    ),
}


def ties(kind: str = "", **parameters: Any) -> dict[str, Any]:
    models = [model(f"a{kind}", weight=0.6), model(f"b{kind}", weight=0.9), model(f"c{kind}", weight=0.4)]
    return recipe("ties", *models, base=f"base{kind}", **parameters)


TIES = {
    f"ties {density} {name}{kind}": ties(kind, density=density, **parameters)
    for kind in ("", "16")
    for density, name, parameters in (
        (0.3, "", {}),
        (0.5, "sum", {"normalize": False}),
        (0.5, "lambda", {"lambda_": 0.7}),
        (0.5, "rescale", {"rescale": True}),
        (0.3, "rescaled sum", {"rescale": True, "normalize": False, "lambda_": 1.4}),
        (1.0, "", {}),
        (1.0, "rescale", {"rescale": True}),
        (0.0001, "", {}),
    )
} | {
    "ties base listed": recipe(
        "ties",
        model("a", weight=1, density=0.4),
        model("base"),
        model("b", weight=[1, 0.5]),
        base="base",
        density=[0.9, 0.2],
    ),
    "ties filters": recipe(
        "ties",
        model("a", density=[{"filter": "mlp", "value": [0.1, 0.8]}]),
        model("b"),
        base="base",
        weight=BY_KIND,
        density=0.6,
    ),
}
KEPT = {
    f"kept {density}{kind}": recipe(
        "ties", model(f"a{kind}", weight=1), base=f"base{kind}", density=density, normalize=False
    )
    for kind in ("", "16")
    for density in (0.3, 0.5, 0.0001)
}
DROPPED = {
    f"{method} {density}": recipe(method, model("a", weight=1), base="base", density=density)
    for method in ("dare_linear", "dare_ties")
    for density in (0.5, 0.2)
} | {"dare_linear not rescaled": recipe("dare_linear", model("a", weight=1), base="base", density=0.5, rescale=False)}
REFUSED = {
    "slerp of three": recipe("slerp", model("base"), model("a"), model("b"), base="base", t=0.5),
    "slerp of two and a base": recipe("slerp", model("a"), model("b"), base="base", t=0.5),
    "slerp of one": recipe("slerp", model("base"), base="base", t=0.5),
    "passthrough of two": recipe("passthrough", model("a"), model("b")),
    "no weight": recipe("linear", model("a", weight=1), model("b")),
    "no weight where no filter matches": recipe(
        "linear", model("a", weight=1), model("b", weight={"filter": "mlp", "value": 1})
    ),
    "no base": recipe("ties", model("a", weight=1), model("b", weight=1)),
    "listed twice": recipe("linear", model("a", weight=1), model("a", weight=1)),
}
# mergekit divides by zero, or refuses for want of a weight for the base.
DIFFERENT = {
    "weights sum to zero": recipe("linear", model("a", weight=1), model("b", weight=-1)),
    "linear base without a weight": recipe("linear", model("a", weight=0.3), model("b", weight=0.9), base="base"),
}
RECIPES = LINEAR | SLERP | TASK | TIES | KEPT | DROPPED | REFUSED | DIFFERENT


def peer() -> Path:
    """mergekit's Python."""
    folder = os.environ.get("MERGEFORGE_PEERS") or Path(__file__).parents[2] / ".venv-peers"
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"mergekit is not there: no {python} (set MERGEFORGE_PEERS to a venv with mergekit 0.1.5)")
    return python


class Peers:
    """The recipes' results from both programs; ours is computed when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors: dict[str, str] = {}

    def write(self) -> None:
        shape = SHAPES["tiny"]
        for dtype, kind in (("F32", ""), ("BF16", "16")):
            write_model(self.folder / f"base{kind}", shape, seed=0, dtype=dtype)
            for seed, name in enumerate("abc", 1):
                write_model(self.folder / f"{name}{kind}", shape, seed=seed, near=0, dtype=dtype)
        write_model(self.folder / "far", shape, seed=9, dtype="F32")
        for name, value in RECIPES.items():
            text = yaml.safe_dump(self._placed(value), sort_keys=False)
            self._file(name).write_text(text, encoding="utf-8")

    def run_mergekit(self, python: Path) -> None:
        jobs = [{"name": name, "recipe": str(self._file(name)), "out": str(self._out(name))} for name in RECIPES]
        errors = self.folder / "errors.json"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [str(python), "-c", DRIVER, str(errors)]
        done = subprocess.run(
            command, input=json.dumps(jobs), text=True, capture_output=True, env=environment, check=False, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
        self.errors = json.loads(errors.read_text())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {key: value.float() for key, value in load_file(self.folder / name / "model.safetensors").items()}

    def theirs(self, name: str) -> dict[str, torch.Tensor]:
        assert name not in self.errors, self.errors[name]
        return load_file(next(self._out(name).glob("*.safetensors")))

    def plan(self, name: str) -> mergeforge.Plan:
        return mergeforge.plan(self._file(name), out=self.folder / f"ours {name}", device="cpu", threads=1)

    def ours(self, name: str) -> dict[str, torch.Tensor]:
        out = mergeforge.merge(self._file(name), out=self.folder / f"ours {name}", device="cpu", threads=1)
        return load_file(out / "model.safetensors")

    def both(self, name: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        ours, theirs = self.ours(name), self.theirs(name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype == torch.float32
            assert value.shape == theirs[key].shape
            yield key, value, theirs[key]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.yml"

    def _out(self, name: str) -> Path:
        return self.folder / f"theirs {name}"

    def _placed(self, value: dict[str, Any]) -> dict[str, Any]:
        """The recipe with whole paths for the models."""
        models = [one | {"model": str(self.folder / one["model"])} for one in value["models"]]
        base = {"base_model": str(self.folder / value["base_model"])} if "base_model" in value else {}
        return value | {"models": models} | base


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    python = peer()
    both = Peers(tmp_path_factory.mktemp("mergekit"))
    both.write()
    both.run_mergekit(python)
    return both


def ulps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many float32 numbers lie between each two elements."""

    def place(value: torch.Tensor) -> torch.Tensor:
        bits = value.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (place(one) - place(other)).abs()


@pytest.mark.parametrize("name", LINEAR)
def test_linear_and_passthrough_are_equal(peers: Peers, name: str) -> None:
    for key, ours, theirs in peers.both(name):
        assert torch.equal(ours, theirs), f"{key}: {int(ulps(ours, theirs).max())} ulp"


@pytest.mark.parametrize("name", TASK)
def test_task_arithmetic_and_dare_that_keeps_all_are_equal(peers: Peers, name: str) -> None:
    for key, ours, theirs in peers.both(name):
        assert int(ulps(ours, theirs).max()) <= 1, key


@pytest.mark.parametrize("name", [name for name in SLERP if "near" in name])
def test_slerp_on_a_straight_line_is_equal(peers: Peers, name: str) -> None:
    for key, ours, theirs in peers.both(name):
        assert torch.equal(ours, theirs), f"{key}: {int(ulps(ours, theirs).max())} ulp"


@pytest.mark.parametrize("name", [name for name in SLERP if "near" not in name])
def test_slerp_on_an_arc(peers: Peers, name: str) -> None:
    """mergekit's angle is rounded to float32: the coefficients differ in their last bits."""
    base, far = peers.tensors("base"), peers.tensors("far")
    for key, ours, theirs in peers.both(name):
        scale = base[key].abs() + far[key].abs()
        assert bool(((ours - theirs).abs() <= 4 * EPSILON * scale).all()), key


class Trim:
    """What trimming must keep of one task vector, by numpy's stable sort."""

    def __init__(self, delta: torch.Tensor, density: float) -> None:
        magnitudes = delta.abs().flatten().numpy()
        self.keep = max(1, int(density * len(magnitudes))) if density < 1 else len(magnitudes)
        order = np.argsort(-magnitudes, kind="stable")
        self.value = float(magnitudes[order[self.keep - 1]])
        self.cut_through = bool(
            (magnitudes == self.value).sum() != (magnitudes[order[: self.keep]] == self.value).sum()
        )

    def undecided(self, delta: torch.Tensor) -> torch.Tensor:
        """Elements that mergekit's unstable sort may keep or drop."""
        return (delta.abs() == self.value) & self.cut_through


@pytest.mark.parametrize("name", TIES)
def test_ties(peers: Peers, name: str) -> None:
    written = RECIPES[name]
    rescaled = bool(written["parameters"].get("rescale"))
    base = peers.tensors(written["base_model"])
    models = [one for one in written["models"] if one["model"] != written["base_model"]]
    weights = {one["model"]: peers.tensors(one["model"]) for one in models}
    positions = layer_positions(base)
    decided = 0
    for key, ours, theirs in peers.both(name):
        undecided = torch.zeros_like(ours, dtype=torch.bool)
        largest = base[key].abs()
        for one in models:
            delta = weights[one["model"]][key] - base[key]
            setting = one.get("parameters", {}).get("density")
            density = value_at(setting, key, positions[key])
            if density is None:
                density = value_at(written["parameters"]["density"], key, positions[key])
            undecided |= Trim(delta, density).undecided(delta)
            largest = largest + delta.abs()
        # mergekit's ratio differs with the kept ties and in its last bits
        tolerance = 1e-6 * largest if rescaled else torch.zeros_like(largest)
        apart = (ulps(ours, theirs) > 1) & ((ours - theirs).abs() > tolerance) & ~undecided
        assert not bool(apart.any()), f"{key}: {int(apart.sum())} of {apart.numel()}"
        decided += int((~undecided).sum())
    assert decided > 0.5 * sum(tensor.numel() for tensor in base.values())


@pytest.mark.parametrize("name", KEPT)
def test_ties_keeps_as_many(peers: Peers, name: str) -> None:
    written = RECIPES[name]
    base, tuned = peers.tensors(written["base_model"]), peers.tensors(written["models"][0]["model"])
    cut_through = 0
    for key, ours, theirs in peers.both(name):
        delta = tuned[key] - base[key]
        trim = Trim(delta, written["parameters"]["density"])
        changed = min(trim.keep, int((delta != 0).sum()))
        assert int((ours != base[key]).sum()) == int((theirs != base[key]).sum()) == changed, key
        cut_through += trim.cut_through
    assert cut_through or "16" not in name


@pytest.mark.parametrize("name", DROPPED)
def test_dare_keeps_the_density_and_the_mass(peers: Peers, name: str) -> None:
    """The masks differ; what they amount to does not."""
    written = RECIPES[name]
    density, rescale = written["parameters"]["density"], written["parameters"].get("rescale", True)
    base, tuned = peers.tensors("base"), peers.tensors("a")
    for program in (peers.ours(name), peers.theirs(name)):
        kept = total = 0
        for key, value in program.items():
            delta, change = tuned[key] - base[key], value - base[key]
            if not bool(delta.any()):
                assert torch.equal(value, base[key])
                continue
            kept += int((change != 0).sum())
            total += delta.numel()
            if rescale:
                before, after = float(delta.double().abs().sum()), float(change.double().abs().sum())
                assert math.isclose(before, after, rel_tol=1e-5), key
            else:
                assert bool(((change == 0) | ((change - delta).abs() < 1e-8)).all())
        assert abs(kept - density * total) <= 3 * math.sqrt(total * density * (1 - density))


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(peers: Peers, name: str) -> None:
    assert name in peers.errors
    with pytest.raises(RecipeError):
        peers.plan(name)


def test_weights_that_sum_to_zero(peers: Peers) -> None:
    """mergekit writes a model of inf and NaN."""
    theirs = peers.theirs("weights sum to zero")
    assert not all(bool(value.isfinite().all()) for value in theirs.values())
    with pytest.raises(RecipeError, match="sum to zero"):
        peers.plan("weights sum to zero")


def test_a_base_that_has_no_weight(peers: Peers) -> None:
    """mergekit wants a weight for a base that is not listed; here it then takes no part."""
    name = "linear base without a weight"
    assert re.search("Missing required parameter weight", peers.errors[name])
    assert any("take no part" in note for note in peers.plan(name).notes)
    ours, without = peers.ours(name), peers.theirs("linear two")
    assert all(torch.equal(ours[key], without[key]) for key in without)
