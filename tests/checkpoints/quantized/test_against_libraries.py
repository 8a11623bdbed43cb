"""Dequantised values against those of the formats' own libraries, recorded by tools/golden_quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoint_values import opened, values

from mergeforge.core import tensor_info as table

HERE = Path(__file__).parent


def cases(library: str) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """By case: the stored tensors and the config's quantization_config."""
    found: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
    with safe_open(HERE / f"golden_{library}.safetensors", "pt") as file:
        configs = json.loads(file.metadata()["configs"])
        for name in file.keys():  # noqa: SIM118  # it is no dict
            case, _, tensor = name.partition("/")
            found.setdefault(case, ({}, configs.get(case, {})))[0][tensor] = file.get_tensor(name)
    return found


CASES = {**cases("bitsandbytes"), **cases("compressed_tensors"), **cases("transposed")}
STORED = [case for case in CASES if not case.startswith("simulated")]


def config_of(case: str) -> dict[str, Any]:
    tensors, settings = CASES[case]
    return {"quantization_config": settings, "dtype": str(tensors["="].dtype).removeprefix("torch.")}


def stored(case: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in CASES[case][0].items() if name != "="}


@pytest.mark.parametrize("elements", [1 << 19, 300])
@pytest.mark.parametrize("case", STORED)
def test_values_are_the_library_s(case: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whole and in tiles of a few rows that begin inside blocks of codes."""
    monkeypatch.setattr(table, "BLOCK_ELEMENTS", elements)
    checkpoint = opened(tmp_path, stored(case), config_of(case))
    assert list(checkpoint.tensors) == ["m.weight"]
    expected = CASES[case][0]["="]
    found = values(checkpoint.tensors["m.weight"], rows=1)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", STORED)
def test_the_config_says_nothing_of_it_any_more(case: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, stored(case), config_of(case))
    assert "quantization_config" not in checkpoint.config
    assert any("dequantised 1 tensors of" in note for note in checkpoint.warnings)
