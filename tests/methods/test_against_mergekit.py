"""The same YAML through mergekit 0.1.5 and through mergeforge: every element of every tensor.

All recipes run in one mergekit process: its imports take seconds. `dtype: float32`, so that both
compute alike. Models are tiny Llamas; the bfloat16 ones have task vectors full of equal magnitudes.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.peers import peer_program

import mergeforge
from mergeforge.errors import RecipeError
from mergeforge.methods import METHODS
from mergeforge.operations.synthetic_models import SHAPES, write_model
from mergeforge.recipe.parameter_values import layer_positions, value_at

pytestmark = pytest.mark.peers

Tensors = Mapping[str, torch.Tensor]
EPSILON = 2.0**-23

DRIVER = """
import json, logging, os, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

logging.disable(logging.CRITICAL)
options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, random_seed=1)
errors = {}
for job in json.load(sys.stdin):
    try:
        with open(job["recipe"]) as file:
            value = yaml.safe_load(file)
        value["dtype"] = job["dtype"]
        if job["raw"]:
            names = [one["model"] for one in value["models"]]
            names += [value["base_model"]] if "base_model" in value else []
            weights = {one["model"]: one["parameters"]["weight"] for one in value["models"] if "parameters" in one}
            merged = merge_state_dicts(
                {name: load_file(name + "/model.safetensors") for name in names},
                value["merge_method"],
                parameters=value.get("parameters", {}) | ({"weight": weights} if weights else {}),
                base=value.get("base_model"),
            )
            os.mkdir(job["out"])
            save_file(merged, job["out"] + "/model.safetensors")
        else:
            run_merge(MergeConfiguration.model_validate(value), job["out"], options)
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
DROPPED = (
    {
        f"{method} {density}": recipe(method, model("a", weight=1), base="base", density=density)
        for method in ("dare_linear", "dare_ties")
        for density in (0.5, 0.2)
    }
    | {
        f"{method} {density}": recipe(method, model("a", weight=1), base="base", density=density, epsilon=epsilon)
        for method in ("della", "della_linear")
        for density, epsilon in ((0.5, 0.3), (0.2, 0.1))
    }
    | {"dare_linear not rescaled": recipe("dare_linear", model("a", weight=1), base="base", density=0.5, rescale=False)}
)


def some(method: str, names: str, *, base: str | None = "base", kind: str = "", **parameters: Any) -> dict[str, Any]:
    """A recipe over models with one-letter names; with weights where the method takes them."""
    weights = METHODS[method].parameters.get("weight")
    models = [
        model(f"{name}{kind}", **({"weight": 0.4 + 0.25 * at} if weights else {})) for at, name in enumerate(names)
    ]
    return recipe(method, *models, base=base and base + kind, **parameters)


# Arithmetic in another order, or in float64 where mergekit's is float32: compared at 1e-6 of the
# largest input or the result. In v, w, x, y and z the norms differ from the base's as well.
MANY = {
    f"{method} {label} of {len(names)} {kind}": some(method, names, base=base, kind=kind, **parameters)
    for method, label, base, parameters in (
        ("ram", "", "base", {}),
        ("ram", "epsilon", "base", {"epsilon": 4e-4}),
        ("ramplus_tl", "", "base", {"epsilon": 4e-4}),
        ("ramplus_tl", "more", "base", {"r": [0.5, 0.2], "alpha": 0.7, "epsilon": 6e-4}),
        ("model_stock", "", "base", {}),
        ("model_stock", "rows", "base", {"filter_wise": True}),
        ("multislerp", "", None, {}),
        ("multislerp", "base", "base", {}),
        ("multislerp", "sum", "base", {"normalize_weights": False}),
        ("karcher", "", None, {}),
        ("karcher", "base", "base", {"max_iter": 3}),
        ("sce", "", "base", {}),
        ("sce", "half", "base", {"select_topk": [0.5, 0.3]}),
        ("sce", "none", "base", {"select_topk": 0}),
        ("breadcrumbs", "", "base", {"density": 0.5, "gamma": 0.05}),
        ("breadcrumbs", "rescale", "base", {"density": 0.5, "gamma": 0.05, "rescale": True}),
        ("breadcrumbs", "all", "base", {"density": 1.0}),
        ("breadcrumbs", "no top", "base", {"density": 0.3, "gamma": 0.0, "normalize": True}),
        ("breadcrumbs", "all but the top", "base", {"density": 0.9, "gamma": 0.3}),
        ("breadcrumbs", "gradient", "base", {"density": [0.9, 0.1], "gamma": [0.01, 0.2]}),
        ("breadcrumbs_ties", "", "base", {"density": 0.5, "gamma": 0.05, "lambda_": 1.2}),
        ("breadcrumbs_ties", "rescale", "base", {"density": BY_KIND[2:], "normalize": True, "rescale": True}),
        ("della", "all", "base", {"density": 1.0}),
        ("della_linear", "all", "base", {"density": 1.0}),
    )
    for names, kind in (("yz", ""), ("xyz", "16"), ("vwxyz", ""), ("vwxyz", "16"))
}
FLAGS = {
    "": {},
    "rows": {"nuslerp_flatten": False},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}
PAIRS = {
    f"{method} {label}{kind}": some(method, "y", kind=kind, **parameters)
    for method, label, parameters in (
        ("nearswap", "", {"t": 1e-4}),
        ("nearswap", "gradient", {"t": [1e-4, 3e-4]}),
        ("nearswap", "filters", {"t": BY_KIND}),
        ("nearswap", "none", {"t": 0}),
        ("arcee_fusion", "", {}),
    )
    for kind in ("", "16")
} | {
    f"nuslerp {label} {base}{kind}": some("nuslerp", "yz", base=base, kind=kind, **flags)
    for label, flags in FLAGS.items()
    for base in (None, "base")
    for kind in ("", "16")
}
FAR = {
    "nearswap listed": recipe("nearswap", model("base"), model("far"), base="base", t=1e-4),
    "arcee_fusion far": recipe("arcee_fusion", model("far"), base="base"),
    "arcee_fusion listed last": recipe("arcee_fusion", model("a"), model("base"), base="base"),
    "model_stock far": recipe("model_stock", model("a"), model("far"), base="base"),
    "model_stock base listed": recipe("model_stock", model("y"), model("base"), model("z"), base="base"),
    "karcher far": recipe("karcher", model("a"), model("b"), model("far")),
    "karcher apart": recipe("karcher", model("a"), model("far"), max_iter=3),
    "karcher one": recipe("karcher", model("a")),
    "multislerp far": recipe("multislerp", model("a", weight=1), model("far", weight=2), model("b", weight=0.3)),
    "multislerp one": recipe("multislerp", model("y", weight=0), base="base"),
    "multislerp base listed": recipe(
        "multislerp", model("base"), model("y", weight=1), model("z", weight=2), base="base"
    ),
    "multislerp filters": recipe("multislerp", model("y", weight=BY_KIND), model("z", weight=[0.1, 1.0])),
    "sce far": recipe("sce", model("a"), model("far"), base="base"),
    "sce half far": recipe("sce", model("a"), model("b"), model("far"), base="base", select_topk=0.5),
    "ram one": recipe("ram", model("a"), base="base"),
    "nuslerp gradient": recipe("nuslerp", model("a", weight=[0.1, 1]), model("b", weight=0.5)),
    "nuslerp weights cancel": recipe("nuslerp", model("a", weight=1), model("far", weight=-1)),
} | {
    f"nuslerp far {label}": recipe("nuslerp", model("a", weight=1), model("far", weight=2), **flags)
    for label, flags in FLAGS.items()
}
# Shapes that no Llama has, through mergekit-pytorch: (7,), (1,), (5, 1), (1, 9), (33, 65), (3, 8, 16), (700,).
ODD = {
    f"odd {method} {at}": some(method, "y" if METHODS[method].base_is_input else "yz", kind=" odd", **parameters)
    for at, (method, parameters) in enumerate(
        (
            ("ram", {"epsilon": 4e-4}),
            ("ramplus_tl", {"epsilon": 4e-4}),
            ("model_stock", {}),
            ("nuslerp", {}),
            ("multislerp", {}),
            ("karcher", {}),
            ("sce", {}),
            ("sce", {"select_topk": 0.4}),
            ("breadcrumbs", {"density": 0.5, "gamma": 0.05}),
            ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.2}),
            ("nearswap", {"t": 2e-4}),
            ("arcee_fusion", {}),
            ("ties", {"density": 0.4}),
            ("model_stock", {"filter_wise": True}),
            ("nuslerp", FLAGS["rows"]),
        )
    )
}
NEAR = MANY | PAIRS | FAR | ODD
# Computed by mergekit in float64: in float32 the rounding of its cosines near 1 moves karcher's mean by up to a half of
# what near models differ by, and the lengths of the others in the sixth digit.
UNSTEADY = ("karcher", "multislerp", "nuslerp")
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
    "nuslerp of three": some("nuslerp", "abc"),
    "nuslerp of the base and another": recipe("nuslerp", model("base", weight=1), model("a", weight=1), base="base"),
    "nuslerp of one": some("nuslerp", "a", base=None),
    "model_stock of one": some("model_stock", "a"),
    "model_stock without a base": some("model_stock", "abc", base=None),
    "nearswap of three": some("nearswap", "ab", t=0.1),
    "nearswap without t": some("nearswap", "a"),
    "arcee_fusion without a base": some("arcee_fusion", "ab", base=None),
    "arcee_fusion of three": some("arcee_fusion", "ab"),
    "ram without a base": some("ram", "ab", base=None),
    "della that drops too much": some("della", "ab", density=0.1),
    "multislerp without weights": recipe("multislerp", model("a"), model("b")),
}
# mergekit divides by zero, or refuses for want of a weight for the base.
DIFFERENT = {
    "weights sum to zero": recipe("linear", model("a", weight=1), model("b", weight=-1)),
    "multislerp of equal norms": some("multislerp", "abc"),
    "linear base without a weight": recipe("linear", model("a", weight=0.3), model("b", weight=0.9), base="base"),
}
RECIPES = LINEAR | SLERP | TASK | TIES | KEPT | DROPPED | NEAR | REFUSED | DIFFERENT


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
            for seed, name in enumerate("vwxyz", 20):
                self._write_moved(f"base{kind}", f"{name}{kind}", seed)
        write_model(self.folder / "far", shape, seed=9, dtype="F32")
        self._write_odd()
        for name, value in RECIPES.items():
            text = yaml.safe_dump(self._placed(value), sort_keys=False)
            self._file(name).write_text(text, encoding="utf-8")

    def _write_moved(self, near: str, name: str, seed: int) -> None:
        """A model with every tensor, norms too, a little apart from another's."""
        shutil.copytree(self.folder / near, self.folder / name)
        generator = torch.Generator().manual_seed(seed)
        values = load_file(self.folder / near / "model.safetensors")
        for key, value in values.items():
            step = 5e-4 if value.ndim > 1 else 0.05
            values[key] = value + (step * torch.randn(value.shape, generator=generator)).to(value.dtype)
        save_file(values, self.folder / name / "model.safetensors", {"format": "pt"})

    def _write_odd(self) -> None:
        shapes = [(7,), (1,), (5, 1), (1, 9), (33, 65), (3, 8, 16), (700,)]
        generator = torch.Generator().manual_seed(3)
        folder = self.folder / "base odd"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        values = {f"w{at}": 0.02 * torch.randn(shape, generator=generator) for at, shape in enumerate(shapes)}
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        for seed, name in enumerate("yz", 40):
            self._write_moved("base odd", f"{name} odd", seed)

    def run_mergekit(self, python: Path) -> None:
        jobs = [
            {
                "name": name,
                "recipe": str(self._file(name)),
                "out": str(self._out(name)),
                "raw": name in ODD,
                "dtype": "float64" if value["merge_method"] in UNSTEADY and name in NEAR else "float32",
            }
            for name, value in RECIPES.items()
        ]
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
        tensors = load_file(next(self._out(name).glob("*.safetensors")))
        return {key: value.float() if name in NEAR else value for key, value in tensors.items()}

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
    python = peer_program()
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
def test_linear_and_passthrough_match_mergekit_exactly(peers: Peers, name: str) -> None:
    for key, ours, theirs in peers.both(name):
        assert torch.equal(ours, theirs), f"{key}: {int(ulps(ours, theirs).max())} ulp"


@pytest.mark.parametrize("name", TASK)
def test_task_arithmetic_and_dare_at_density_1_match_mergekit_exactly(peers: Peers, name: str) -> None:
    for key, ours, theirs in peers.both(name):
        assert int(ulps(ours, theirs).max()) <= 1, key


@pytest.mark.parametrize("name", [name for name in SLERP if "near" in name])
def test_slerp_of_parallel_tensors_matches_mergekit_exactly(peers: Peers, name: str) -> None:
    for key, ours, theirs in peers.both(name):
        assert torch.equal(ours, theirs), f"{key}: {int(ulps(ours, theirs).max())} ulp"


@pytest.mark.parametrize("name", [name for name in SLERP if "near" not in name])
def test_slerp_on_an_arc_is_close_to_mergekit(peers: Peers, name: str) -> None:
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
def test_ties_keeps_as_many_elements_as_mergekit(peers: Peers, name: str) -> None:
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
def test_dare_keeps_the_density_and_the_l1_norm(peers: Peers, name: str) -> None:
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


def undecided(name: str, key: str, deltas: list[torch.Tensor], position: float) -> torch.Tensor:
    """Elements that mergekit's unstable sort may keep or drop: equals on both sides of an edge."""
    written = RECIPES[name].get("parameters", {})
    found = torch.zeros_like(deltas[0], dtype=torch.bool)
    numel = found.numel()
    if written.get("select_topk"):
        spread = torch.stack(deltas).var(dim=0, correction=0)
        kept = int(int(spread.count_nonzero()) * value_at(written["select_topk"], key, position))
        edge = cut_through(spread, [numel - kept])
        return spread >= spread[edge].amin() if edge.any() else edge  # what is kept decides the weights of all of it
    if RECIPES[name]["merge_method"].startswith("breadcrumbs"):
        for delta in deltas:
            kept = int(value_at(written["density"], key, position) * numel)
            top = int(value_at(written.get("gamma", 0.01), key, position) * numel)
            lowest = max(0, numel - kept - top)
            found |= cut_through(delta.abs(), [lowest, lowest + kept]) & (kept < numel)
    return found


def cut_through(values: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """Where values are equal to those at both sides of one of the (ascending) ranks."""
    ordered = values.flatten().sort().values
    edges = [ordered[rank] for rank in ranks if 0 < rank < len(ordered) and ordered[rank - 1] == ordered[rank]]
    return torch.isin(values, torch.stack(edges)) if edges else torch.zeros_like(values, dtype=torch.bool)


@pytest.mark.parametrize("name", NEAR)
def test_other_methods_are_close_to_mergekit(peers: Peers, name: str) -> None:
    written = RECIPES[name]
    base = peers.tensors(written.get("base_model", written["models"][0]["model"]))
    models = [peers.tensors(one["model"]) for one in written["models"] if one["model"] != written.get("base_model")]
    positions = layer_positions(base)
    compared = 0
    for key, ours, theirs in peers.both(name):
        largest = torch.stack([theirs.abs(), base[key].abs(), *(one[key].abs() for one in models)]).amax(dim=0)
        largest = largest.clamp(min=1e-3 * float(largest.max()))
        open_ones = undecided(name, key, [one[key] - base[key] for one in models], positions[key])
        apart = ((ours - theirs).abs() > 1e-6 * largest) & ~open_ones
        assert not bool(apart.any()), f"{key}: {int(apart.sum())} of {apart.numel()}"
        compared += int((~open_ones).sum())
    assert compared > 0.4 * sum(tensor.numel() for tensor in base.values())


@pytest.mark.parametrize("name", REFUSED)
def test_mergekit_and_mergeforge_both_refuse(peers: Peers, name: str) -> None:
    assert name in peers.errors
    with pytest.raises(RecipeError):
        peers.plan(name)


def test_weights_that_sum_to_zero_are_refused(peers: Peers) -> None:
    """mergekit writes a model of inf and NaN."""
    theirs = peers.theirs("weights sum to zero")
    assert not all(bool(value.isfinite().all()) for value in theirs.values())
    with pytest.raises(RecipeError, match="sum to zero"):
        peers.plan("weights sum to zero")


def test_directions_of_equal_models(peers: Peers) -> None:
    """mergekit refuses three models in which a tensor is the base's; here it stays the base's."""
    name = "multislerp of equal norms"
    assert re.search("weighted sum of the input tensors is zero", peers.errors[name])
    base, ours = peers.tensors("base"), peers.ours(name)
    assert all(torch.equal(ours[key], base[key]) for key in base if "norm" in key)


def test_base_without_a_weight(peers: Peers) -> None:
    """mergekit wants a weight for a base that is not listed; here its weights are then not merged."""
    name = "linear base without a weight"
    assert re.search("Missing required parameter weight", peers.errors[name])
    assert any("its weights are not merged" in note for note in peers.plan(name).notes)
    ours, without = peers.ours(name), peers.theirs("linear two")
    assert all(torch.equal(ours[key], without[key]) for key in without)
