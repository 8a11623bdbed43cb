"""Dequantized values compared with those of the formats' own libraries, recorded by tools/golden_quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoint_values import opened, values

from mergeforge.core import tensor_info

HERE = Path(__file__).parent


def cases(library: str) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Case -> the stored tensors and the quantization_config."""
    cases_by_name: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
    with safe_open(HERE / f"golden_{library}.safetensors", "pt") as file:
        configs = json.loads(file.metadata()["configs"])
        for name in file.keys():  # noqa: SIM118  # not a dict
            case, _, tensor = name.partition("/")
            cases_by_name.setdefault(case, ({}, configs.get(case, {})))[0][tensor] = file.get_tensor(name)
    return cases_by_name


CASES = {**cases("bitsandbytes"), **cases("compressed_tensors"), **cases("transposed")}
STORED = [case for case in CASES if not case.startswith("simulated")]


def config_of(case: str) -> dict[str, Any]:
    tensors, settings = CASES[case]
    return {"quantization_config": settings, "dtype": str(tensors["="].dtype).removeprefix("torch.")}


def stored(case: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in CASES[case][0].items() if name != "="}


@pytest.mark.parametrize("elements", [1 << 19, 300])
@pytest.mark.parametrize("case", STORED)
def test_values_equal_those_of_the_library(
    case: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors, and tiles of a few rows that start inside blocks of codes."""
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", elements)
    checkpoint = opened(tmp_path, stored(case), config_of(case))
    assert list(checkpoint.tensors) == ["m.weight"]
    expected = CASES[case][0]["="]
    tensor = values(checkpoint.tensors["m.weight"], rows=1)
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("case", STORED)
def test_removes_the_quantization_config(case: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, stored(case), config_of(case))
    assert "quantization_config" not in checkpoint.config
    assert any("dequantized 1 tensors of" in note for note in checkpoint.warnings)
