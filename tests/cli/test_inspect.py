"""mergeforge inspect shows what is stored, and names what is not a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import mergeforge
from mergeforge.cli import run_command


def test_a_quantized_model_is_shown_as_it_is_stored(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors and bytes of an FP8 folder, against the file; the parameters are those of the model."""
    recipe = {"base_model": "base", "adapters": ["adapters/a"], "output": {"fp8": True}}
    mergeforge.merge(recipe, out="small", device="cpu")
    assert run_command(["inspect", "small", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    with safe_open("small/model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    assert {tensor["name"]: tensor["dtype"] for tensor in facts["tensors"]} == dtypes
    assert facts["bytes_by_dtype"].keys() == {"F8_E4M3", "F32", "BF16"}
    assert facts["config"]["quantization_config"]["quant_method"] == "fp8"
    assert run_command(["inspect", "base", "--json"]) == 0
    assert facts["parameters"] == json.loads(capsys.readouterr().out)["parameters"]
    count = sum(dtype == "F8_E4M3" for dtype in dtypes.values())
    assert facts["in_words"] == [f"{count} weights are stored as FP8; a merge reads them as BF16"]


def test_an_unsupported_quantization_is_shown_too(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    assert run_command(["inspect", "base"]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint base" in shown and "cannot read its weights: base is quantized with 'hqq'" in shown


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("recipe.yaml", "is a recipe or another YAML file"),
        ("base/config.json", "holds no tensors"),
        ("gguf", "holds only GGUF files: base-F16.gguf"),
        ("half", "holds an interrupted merge"),
    ],
)
def test_other_files_and_folders_are_named(
    models: Path, capsys: pytest.CaptureFixture[str], path: str, said: str
) -> None:
    Path("recipe.yaml").write_text("base_model: base\nadapters: [adapters/a]\n")
    mergeforge.convert_to_gguf("base", "f16", out="gguf", device="cpu")
    tiles = mergeforge.iter_run("recipe.yaml", out="half", device="cpu")
    next(tiles)
    tiles.close()  # type: ignore[attr-defined]  # a generator
    assert run_command(["inspect", path]) == 3
    text = capsys.readouterr().err
    assert said in text and "hint" in text and "pickle" not in text
