"""The kinds of configuration that mergekit's documentation shows, on tiny models: every one runs as it is written.

Their shapes are those of mergekit's examples folder and README (0.1.5); models, numbers and words are ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergeforge
from mergeforge.methods import METHODS
from mergeforge.operations.synthetic_models import SHAPES, write_model

EXAMPLES = {
    "linear": """
models:
  - model: tuned-a
    parameters: {weight: 1.0}
  - model: tuned-b
    parameters: {weight: 0.3}
  - model: tuned-c
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
""",
    "gradient-slerp": """
slices:
  - sources:
      - {model: tuned-a, layer_range: [0, 4]}
      - {model: tuned-b, layer_range: [0, 4]}
merge_method: slerp
base_model: tuned-a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "slerp of models": """
models:
  - model: tuned-a
  - model: tuned-b
merge_method: slerp
base_model: tuned-a
parameters: {t: 0.5}
dtype: bfloat16
""",
    "a deeper stack": """
slices:
  - sources:
    - model: tuned-a
      layer_range: [0, 3]
  - sources:
    - model: tuned-b
      layer_range: [1, 4]
merge_method: passthrough
dtype: float16
""",
    "ties with gradients": """
models:
  - model: tuned-a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: tuned-b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: tuned-c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "ties without normalizing": """
models:
  - model: tuned-a
    parameters: {density: 0.5, weight: 0.5}
  - model: tuned-b
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "arcee fusion": """
models:
  - model: tuned-a
  - model: tuned-b
merge_method: arcee_fusion
base_model: tuned-a
dtype: bfloat16
""",
    "several documents": """
name: first-merge
merge_method: linear
models:
  - model: base
  - model: tuned-b
parameters:
  weight: 0.5
---
name: second-merge
merge_method: slerp
base_model: first-merge  # the result above
models:
  - model: tuned-a
parameters:
  t: 0.5
---
merge_method: dare_ties
base_model: base
models:
  - model: second-merge
    parameters: {density: 0.6, weight: 0.5}
  - model: tuned-c
    parameters: {density: 0.8, weight: 0.5}
""",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned-a", "tuned-b", "tuned-c")):
        write_model(folder / name, SHAPES["tiny"], seed=seed, near=0 if seed else None)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(models: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    Path("recipe.yml").write_text(EXAMPLES[name], encoding="utf-8")
    out = mergeforge.merge("recipe.yml", out=f"out {name}", device="cpu")
    tensors = load_file(out / "model.safetensors")
    depth = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    assert f"model.layers.{depth - 1}.mlp.up_proj.weight" in tensors
    assert f"model.layers.{depth}.mlp.up_proj.weight" not in tensors
    wanted = torch.float16 if "float16" in EXAMPLES[name].replace("bfloat16", "") else torch.bfloat16
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}


WITHOUT_WEIGHTS = {
    "slerp": {"t": 0.35},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {},
    "sce": {"select_topk": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "model_stock": {},
    "karcher": {},
}


@pytest.mark.parametrize("method", WITHOUT_WEIGHTS)
def test_weights_without_effect_change_nothing_and_are_a_warning(
    models: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mergekit's own tests give them: the merge with weights against the same merge without."""
    monkeypatch.chdir(models)
    inputs = ("base", "tuned-a") if METHODS[method].inputs[1] == 2 else ("tuned-a", "tuned-b")
    recipe = {"merge_method": method, "base_model": "base", "parameters": WITHOUT_WEIGHTS[method]}
    results = []
    for parameters in ({}, {"weight": 0.6}):
        entries = [{"model": model, "parameters": parameters} for model in inputs]
        plan = mergeforge.plan({**recipe, "models": entries}, out=f"{method} {len(parameters)}", device="cpu")
        assert any("'weight' has no effect" in warning for warning in plan.warnings) == bool(parameters)
        results.append(load_file(mergeforge.run(plan).folder / "model.safetensors"))
    without, with_weights = results
    assert all(torch.equal(tensor, with_weights[name]) for name, tensor in without.items())
