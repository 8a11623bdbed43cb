"""GGUF through llama.cpp's converter, for a class that mergeforge does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.gguf_models import Tiny, make
from support.llama_cpp_tools import TREE, convert, needs_converter, read

import mergeforge
from mergeforge.cli import run_command
from mergeforge.gguf.architectures import ARCHITECTURES

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Apertus: llama.cpp's converter knows it, mergeforge does not."""
    assert "ApertusForCausalLM" not in ARCHITECTURES
    tiny = Tiny("tiny-apertus", "apertus", {"head_dim": 64}, tokenizer="spm")
    return make(tiny, tmp_path_factory.mktemp("models") / tiny.name)


@needs_converter
def test_the_files_equal_those_made_from_the_converters(model: Path, tmp_path: Path) -> None:
    """f32 against the converter's own file, q8_0 against that file requantized; nothing else is left."""
    assert convert([(model, tmp_path / "official.gguf", "f32", "")]) == {}
    mergeforge.convert_to_gguf(tmp_path / "official.gguf", types=["q8_0"], out=tmp_path / "q8_0.gguf", device="cpu")
    out = tmp_path / "out"
    command = ["gguf", str(model), "--type", "f32", "--type", "q8_0", "--converter", TREE, "--out", str(out), *CPU]
    assert run_command(command) == 0
    assert {path.name for path in out.glob("*.gguf")} == {"tiny-apertus-F32.gguf", "tiny-apertus-Q8_0.gguf"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for name, wanted in (("F32", "official"), ("Q8_0", "q8_0")):
        own, other = read(out / f"tiny-apertus-{name}.gguf"), read(tmp_path / f"{wanted}.gguf")
        own_keys = {key: value for key, value in own.keys.items() if key != "general.name"}
        assert own_keys == {key: value for key, value in other.keys.items() if key != "general.name"}
        assert own.tensors == other.tensors


@needs_converter
def test_a_merge_with_the_converter(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`converter:` in a recipe: the plan says so, the receipt has the file, and a failed converter is run again."""
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('out of memory')")
    output = {"gguf": ["q8_0"], "converter": str(tmp_path), "path": str(tmp_path / "merged")}
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}], "output": output}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = ["run", str(tmp_path / "recipe.json"), *CPU]
    assert run_command(command) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "llama.cpp's converter writes the GGUF files (q8_0)" in said and "out of memory" in said
    path = f"{TREE}/convert_hf_to_gguf.py"
    script.write_text(f"import runpy, sys; sys.path[:0] = [{TREE!r}]; runpy.run_path({path!r}, run_name='__main__')")
    assert run_command(command) == 0
    file = tmp_path / "merged" / "merged-Q8_0.gguf"
    assert read(file).keys["general.architecture"][1] == "apertus"
    assert file.name in json.loads((tmp_path / "merged" / "mergeforge.json").read_text())["files"]
    assert run_command(["verify", str(tmp_path / "merged")]) == 0
    assert run_command(command) == 5


def test_the_error_of_an_unknown_class_names_the_converter(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["gguf", str(model), "--type", "q8_0", *CPU]) == 3
    assert "`converter: official`" in capsys.readouterr().err


def test_a_converter_that_fails_is_quoted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tree whose script raises: its last line is shown, and no file is left."""
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such model')")
    command = ["gguf", str(model), "--converter", str(tmp_path), "--out", str(tmp_path / "out"), *CPU]
    assert run_command(command) == 3
    assert "no such model" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.gguf"))


@pytest.mark.parametrize(("options", "message"), [
    (["--converter", "nowhere"], "nowhere is not a llama.cpp tree"),
    (["--converter", "nowhere", "--mmproj", "f16"], "--mmproj has no effect with --converter"),
    (["--converter", "nowhere", "--keep-split"], "--keep-split has no effect with --converter"),
])  # fmt: skip
def test_what_cannot_be_is_refused(
    model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["gguf", str(model), *options]) != 0
    assert message in capsys.readouterr().err


def test_a_recipe_without_safetensors_has_no_use_for_the_converter() -> None:
    output = {"gguf": ["q8_0"], "converter": "official", "safetensors": False}
    with pytest.raises(mergeforge.RecipeError, match="makes GGUF files from the merged safetensors"):
        mergeforge.plan({"merge_method": "passthrough", "models": [{"model": "m"}], "output": output})
