"""A merge of merges: a stage that another one looks at more than once is the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import mergeforge
from mergeforge.methods import METHODS
from mergeforge.native import bindings

pytestmark = pytest.mark.usefixtures("models")

PARAMETERS: dict[str, Any] = {"weight": 0.5, "density": 0.4, "select_topk": 0.4, "rescale": True}
TRIMMING = [name for name in sorted(METHODS) if {"density", "select_topk"} & set(METHODS[name].parameters)]


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("method", TRIMMING)
def test_a_stage_that_is_looked_at_equals_its_file(method: str, in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """slerp takes inner products of the stage first. The inputs are bfloat16, so that thresholds cut through ties."""
    if not in_c:
        monkeypatch.setattr(bindings, "is_available", lambda: False)
    known = METHODS[method].parameters
    stage = {
        "merge_method": method,
        "base_model": "./base",
        "models": [{"model": "./tuned-a"}, {"model": "./tuned-b"}],
        "parameters": {name: value for name, value in PARAMETERS.items() if name in known},
        "dtype": "float32",
    }
    last = {"merge_method": "slerp", "models": [{"model": "./tuned-b"}], "parameters": {"t": 0.3}, "dtype": "float32"}
    both = [stage | {"name": "stage"}, last | {"base_model": "stage"}]
    Path("both.yaml").write_text(yaml.safe_dump_all(both))
    at_once = mergeforge.merge("both.yaml", out="at-once", device="cpu")
    mergeforge.merge(stage, out="on-disk", device="cpu")
    in_turn = mergeforge.merge(last | {"base_model": "./on-disk"}, out="in-turn", device="cpu")
    assert (at_once / "model.safetensors").read_bytes() == (in_turn / "model.safetensors").read_bytes()
