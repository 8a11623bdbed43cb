"""mergeforge inspect describes an adapter in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergeforge.adapters.peft.describe import describe_adapter
from mergeforge.cli import run_command
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def pair(module: str, rank: int) -> list[TensorInfo]:
    name = f"base_model.model.model.layers.{module}"
    return [
        TensorInfo(f"{name}.lora_A.weight", "F32", (rank, 4)),
        TensorInfo(f"{name}.lora_B.weight", "F32", (4, rank)),
    ]


def test_inspect_describes_an_adapter_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "base", SHAPES["tiny"], seed=0)
    write_adapter(tmp_path / "legal", SHAPES["tiny"], str(tmp_path / "base"), rank=4, seed=1)
    assert run_command(["inspect", str(tmp_path / "legal")]) == 0
    told = capsys.readouterr().out
    assert "- LoRA of rank 4, scale 2 (alpha / r)" in told or "- LoRA of rank 4, scale" in told
    assert "modules in 4 layers" in told
    assert run_command(["inspect", str(tmp_path / "legal"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["in_words"][0].startswith("LoRA of rank 4")


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        (LORA, pair("0.q_proj", 8), "LoRA of rank 8, scale 2 (alpha / r)"),
        (LORA | {"use_rslora": True, "lora_alpha": 4}, pair("0.q_proj", 4), "(alpha / sqrt(r))"),
        (LORA, pair("0.q_proj", 8) + pair("1.v_proj", 2), "LoRA of ranks 2 to 8, scale"),
        (LORA, pair("0.q_proj", 8) + pair("1.q_proj", 8), "changes 2 modules in 2 layers: q_proj (2)"),
        (LORA | {"use_dora": True}, pair("0.q_proj", 8), "DoRA of rank 8"),
        (
            LORA,
            [*pair("0.q_proj", 8), TensorInfo("base_model.model.lm_head.weight", "F32", (9, 4))],
            "replaces whole modules (1): lm_head",
        ),
        (LORA | {"target_parameters": ["mlp.experts.down_proj"]}, pair("0.mlp.experts", 8), "parameters of experts"),
        (LORA | {"init_lora_weights": "loftq"}, pair("0.q_proj", 8), "cannot be merged"),
        (LORA | {"base_model_name_or_path": "org/base", "revision": "abc"}, [], "trained on org/base at abc"),
        ({"peft_type": "XLORA"}, [], "XLORA: cannot be merged"),
        ({"peft_type": "SPIRAL"}, [], "SPIRAL: not supported by this version"),
        ({"peft_type": "HIRA", "r": 4}, [], "HIRA: W + W * (B A)"),
    ],
)
def test_descriptions(config: dict[str, object], tensors: list[TensorInfo], sentence: str) -> None:
    assert any(sentence in one for one in describe_adapter(config, tensors)), describe_adapter(config, tensors)
