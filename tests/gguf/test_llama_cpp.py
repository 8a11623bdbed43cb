"""GGUF files in llama.cpp: `verify --engine` and greedy text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mergeforge
from mergeforge.cli import run_command
from mergeforge.errors import MissingExtraError, SourceError
from mergeforge.gguf.llama_cpp import Engine

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def merged(models: Path) -> Path:
    value = {"base_model": "base", "adapters": ["adapters/a"], "dtype": "float32"}
    output = {"gguf": ["f32", "q8_0", "q4_k_m"], "name": "m"}
    return mergeforge.merge({**value, "output": output}, out="merged", device="cpu")


def test_verify_compares_with_transformers(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", "merged", "--engine"]) == 0
    shown = capsys.readouterr().err
    assert all(f"m-{label}.gguf: largest difference 0." in shown for label in ("F32", "Q8_0", "Q4_K_M"))


@pytest.mark.parametrize(
    "value",
    [
        {"merge_method": "passthrough", "models": [{"model": "base"}]},
        {"base_model": "base", "adapters": ["adapters/a"], "dtype": "bfloat16"},
    ],
)
def test_a_folder_with_only_gguf_is_compared(
    models: Path, capsys: pytest.CaptureFixture[str], value: dict[str, Any]
) -> None:
    """With the converted model, or with the model merged again; nothing is left behind."""
    output = {"gguf": ["f32", "q8_0"], "safetensors": False, "name": "m"}
    mergeforge.merge({**value, "output": output}, out="merged", device="cpu")
    before = set(models.iterdir())
    assert run_command(["verify", "merged", "--engine"]) == 0
    shown = capsys.readouterr().err
    assert all(f"m-{label}.gguf: largest difference 0." in shown for label in ("F32", "Q8_0"))
    assert set(models.iterdir()) == before


def test_comparison_detects_a_wrong_file(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes in the middle of the weights are shifted: the file loads, but computes something else."""
    path = merged / "m-F32.gguf"
    data = bytearray(path.read_bytes())
    half = len(data) // 2 // 4096 * 4096
    data[half : half + 200_000] = data[half + 4 : half + 200_004]
    path.write_bytes(data)
    from mergeforge.gguf.llama_cpp import compare_with_transformers

    (comparison,) = compare_with_transformers(merged, {"m-F32.gguf": "F32"})
    assert not comparison.ok


def test_greedy_text_equals_that_of_transformers(merged: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer.encode("the hen in the barn")
    with torch.inference_mode():
        reply = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=False, suppress_tokens=[256, 257, 258]
        )
    expected = tokenizer.decode(reply[0, len(prompt) :])
    assert Engine(merged / "m-F32.gguf").complete(prompt, 6) == expected


def test_errors_for_files_that_the_engine_cannot_load(models: Path) -> None:
    Path("broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(SourceError, match=r"broken\.gguf"):
        Engine("broken.gguf")
    with pytest.raises(SourceError, match="is not a GGUF file"):
        Engine("base")
    assert run_command(["verify", "base", "--engine"]) == 3


def test_missing_xllamacpp_is_reported_with_the_pip_command(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtraError, match="needs xllamacpp") as caught:
        Engine(merged / "m-F32.gguf")
    assert caught.value.exit_code == 6 and "xllamacpp>=" in caught.value.hint
