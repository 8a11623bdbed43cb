"""GGUF through llama.cpp's converter, for a class that mergeforge does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import Tiny, make
from support.llama_cpp_tools import TREE, convert, needs_converter, read

import mergeforge
from mergeforge.cli import run_command
from mergeforge.gguf.architectures import ARCHITECTURES
from mergeforge.operations.official_converter import find_converter

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
    output = {"gguf": ["q8_0", "q4_0"], "converter": str(tmp_path), "path": str(tmp_path / "merged")}
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}], "output": output}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = ["run", str(tmp_path / "recipe.json"), *CPU]
    assert run_command(command) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "llama.cpp's converter writes the GGUF files (q8_0, q4_0)" in said and "out of memory" in said
    path = f"{TREE}/convert_hf_to_gguf.py"
    log = tmp_path / "runs"
    script.write_text(
        f"import runpy, sys; sys.path[:0] = [{TREE!r}]; open({str(log)!r}, 'a').write('run\\n')\n"
        f"runpy.run_path({path!r}, run_name='__main__')"
    )
    assert run_command(command) == 0
    assert log.read_text() == "run\n"  # once for both types
    assert not list((tmp_path / "merged").glob(".*converter*"))
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


def test_an_existing_file_is_refused_before_the_converter_runs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('started')")
    (tmp_path / "small.gguf").write_bytes(b"mine")
    command = ["gguf", str(model), "--converter", str(tmp_path), "--out", str(tmp_path / "small.gguf"), *CPU]
    assert run_command(command) == 5
    assert "started" not in capsys.readouterr().err and (tmp_path / "small.gguf").read_bytes() == b"mine"
    assert run_command([*command, "--type", "q9_x", "--overwrite"]) == 2
    assert "started" not in capsys.readouterr().err


def test_the_installed_converter_is_the_program_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(mergeforge.SourceError, match="converter is not installed"):
        find_converter("official")
    program = tmp_path / "convert-hf-to-gguf"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_converter("official").command == (str(program),)


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


@pytest.mark.parametrize(("more", "message"), [
    ({"safetensors": False}, "makes GGUF files from the merged safetensors"),
    ({"publish": {"repo": "me/m", "stream": True}}, "needs the merged files"),
])  # fmt: skip
def test_the_converter_needs_the_merged_files(more: dict[str, Any], message: str) -> None:
    output = {"gguf": ["q8_0"], "converter": "official", **more}
    with pytest.raises(mergeforge.RecipeError, match=message):
        mergeforge.plan({"merge_method": "passthrough", "models": [{"model": "m"}], "output": output})
