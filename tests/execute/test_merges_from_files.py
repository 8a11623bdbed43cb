"""Merges from file to file in C: without torch, but with the same errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge.errors import SourceError
from mergeforge.native import bindings
from mergeforge.tensors import budget

pytestmark = [
    pytest.mark.needs_kernels,
    pytest.mark.usefixtures("models"),
]

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from mergeforge.__main__ import main
main()
"""
PARAMETERS: dict[str, dict[str, Any]] = {
    "passthrough": {"scale": 0.9},
    "linear": {"weight": 0.3},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.3},
    "multislerp": {"weight": 0.3},
    "karcher": {},
    "task_arithmetic": {"weight": 0.3},
    "model_stock": {},
    "dare_linear": {"weight": 0.3, "density": 0.4},
    "dare_ties": {"weight": 0.3, "density": 0.4},
    "nearswap": {"t": 1e-3},
    "ties": {"weight": 0.3, "density": 0.4, "rescale": True},
    "breadcrumbs": {"weight": 0.3, "density": 0.4},
    "breadcrumbs_ties": {"weight": 0.3, "density": 0.4},
    "della": {"weight": 0.3, "density": 0.4},
    "della_linear": {"weight": 0.3, "density": 0.4, "epsilon": 0.2},
    "sce": {"select_topk": 0.4},
}
SINGLE_MODEL = ("passthrough", "slerp", "nearswap")  # one model, with or without a base


def recipe(method: str) -> dict[str, Any]:
    models = [{"model": "./tuned-a"}] if method in SINGLE_MODEL else [{"model": "./tuned-a"}, {"model": "./tuned-b"}]
    has_base = method not in ("passthrough", "linear", "karcher", "nuslerp", "multislerp")
    value = {"merge_method": method, "models": models, "parameters": PARAMETERS[method]}
    return value | ({"base_model": "./base"} if has_base else {})


@pytest.mark.parametrize("method", PARAMETERS)
def test_merges_from_file_to_file_do_not_import_torch(method: str) -> None:
    Path("recipe.yaml").write_text(json.dumps(recipe(method)))
    command = [sys.executable, "-c", WITHOUT_TORCH, "run", "recipe.yaml", "--out", "out"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    receipt = json.loads(Path("out/mergeforge.json").read_text())
    assert receipt["run"]["peak_rss"] < 100 << 20


def test_plans_torch_for_what_the_c_library_cannot_merge() -> None:
    plan = mergeforge.plan(recipe("model_stock"), out="out", device="cpu")
    assert not plan.needs_torch
    filter_wise = recipe("model_stock") | {"parameters": {"filter_wise": True}}
    assert mergeforge.plan(filter_wise, out="out", device="cpu").needs_torch
    with_gguf = recipe("linear") | {"output": {"gguf": ["f16"]}}
    assert mergeforge.plan(with_gguf, out="out", device="cpu").needs_torch
    assert mergeforge.plan(recipe("linear"), out="out", device="cpu", memory="16MiB").peak < 16 << 20


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_names_an_input_that_is_truncated_during_the_merge(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header was intact when the file was opened."""
    name = "inner_products" if method == "slerp" else "reduce"
    kernel = getattr(bindings.kernels(), name)

    def cut(*arguments: Any) -> Any:
        os.truncate("tuned-a/model.safetensors", 4096)
        return kernel(*arguments)

    monkeypatch.setattr(bindings.kernels(), name, cut)
    with pytest.raises(SourceError, match=r"tuned-a/model.safetensors ends at byte \d+; it changed while"):
        mergeforge.merge(recipe(method), out="out", device="cpu", threads=1)


def test_refuses_nonfinite_values_unless_allowed(tmp_path: Path) -> None:
    """The error tells their number and position; with allow_nonfinite, they are written as torch writes them."""
    weights = load_file("tuned-a/model.safetensors")
    weights["lm_head.weight"][3, 5], weights["lm_head.weight"][7, 1] = torch.inf, torch.nan
    save_file(weights, "tuned-a/model.safetensors", {"format": "pt"})
    columns = weights["lm_head.weight"].shape[1]
    message = rf"lm_head.weight would hold 2 infinite or NaN .*first at element {3 * columns + 5}"
    with pytest.raises(SourceError, match=message):
        mergeforge.merge(recipe("linear"), out="out", device="cpu")
    in_c = mergeforge.merge(recipe("linear"), out="in-c", device="cpu", allow_nonfinite=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings, "is_available", lambda: False)
        in_torch = mergeforge.merge(recipe("linear"), out="in-torch", device="cpu", allow_nonfinite=True)
    assert (in_c / "model.safetensors").read_bytes() == (in_torch / "model.safetensors").read_bytes()


def test_change_stats_in_the_receipt_equal_torchs() -> None:
    def changes(out: Path) -> Any:
        receipt = json.loads((out / "mergeforge.json").read_text())
        return {name: entry["change"] for name, entry in receipt["tensors"].items() if "change" in entry}

    in_c = changes(mergeforge.merge(recipe("task_arithmetic"), out="in-c", device="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings, "is_available", lambda: False)
        in_torch = changes(mergeforge.merge(recipe("task_arithmetic"), out="in-torch", device="cpu"))
    assert in_c and {name: pytest.approx(change, rel=1e-9) for name, change in in_torch.items()} == in_c


def test_does_not_ask_torch_for_a_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(asked.append("cuda")))
    monkeypatch.setattr(budget, "DEVICES", tmp_path)
    assert budget.make_budget().device == "cpu" and not asked
    (tmp_path / "nvidia0").touch()
    assert budget.make_budget().device == "cpu" and asked
