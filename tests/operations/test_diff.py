"""mergeforge diff: differences grouped by module and layer, each tensor, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeforge.cli import run_command

UP, DOWN = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture
def changed(models: Path) -> dict[str, torch.Tensor]:
    """The base with up_proj scaled by 1.5 in layer 1, and down_proj by 1.01 in layers 0 and 2."""
    tensors = {name: tensor.float() for name, tensor in load_file("base/model.safetensors").items()}
    save_file(tensors, "base/model.safetensors")
    scales = {UP.format(1): 1.5, DOWN.format(0): 1.01, DOWN.format(2): 1.01}
    new = {name: tensor * scales.get(name, 1) for name, tensor in tensors.items()}
    save_file(new, "tuned-a/model.safetensors")
    return tensors


def test_groups_show_the_largest_changes_first(
    changed: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows' order and relative differences, against norms computed with torch."""
    assert run_command(["diff", "base", "tuned-a"]) == 1
    text = capsys.readouterr().out
    modules, layers = text.split("\n\n")[:2]
    rows = [line.split() for line in modules.splitlines()[1:]]
    count = sum(name.endswith("up_proj.weight") for name in changed)
    assert [row[-1] for row in rows] == [UP.format("*"), DOWN.format("*")]
    assert rows[0][2:5] == ["1", "of", str(count)] and rows[1][2:5] == ["2", "of", str(count)]
    ups = [changed[UP.format(layer)].double().norm() for layer in range(count)]
    expected = float(0.5 * ups[1] / torch.stack(ups).norm())
    assert float(rows[0][0]) == pytest.approx(expected, rel=5e-3)
    assert layers.splitlines()[1].split()[-1] == "1"
    assert f"{len(changed) - 3} of {len(changed)} tensors are the same" in text


def test_all_lists_every_tensor_the_largest_change_first(
    changed: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["diff", "base", "tuned-a", "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [UP.format(1), DOWN.format(0), DOWN.format(2)]
    assert lines[0] == f"{UP.format(1)}: values differ  relative 0.5, largest {lines[0].rpartition(' ')[2]}"


def test_json_has_an_entry_for_every_tensor(
    changed: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["diff", "base", "tuned-a", "--json"]) == 1
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries.keys() == changed.keys()
    assert entries[UP.format(1)]["what"] == "values differ" and entries[UP.format(0)]["what"] == "same"
    assert entries[UP.format(1)]["relative"] == pytest.approx(0.5)


def test_tensors_of_several_layers_that_differ_alike_are_one_line(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file("base/model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "up_proj" not in name}, "tuned-a/model.safetensors")
    assert run_command(["diff", "base", "tuned-a"]) == 1
    count = sum("up_proj" in name for name in tensors)
    assert f"{UP.format('*')}: only in base ({count} tensors)\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["base", "adapters/a"], ["adapters/a", "base"], ["base.gguf", "adapters/a"]])
def test_a_model_and_an_adapter_are_refused(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run_command(["gguf", "base", "--type", "f16", "--out", "base.gguf", "-q"]) == 0
    assert run_command(["diff", *arguments]) == 3
    assert "is a model and adapters/a is an adapter" in capsys.readouterr().err
    assert run_command(["diff", "adapters/a", "adapters/a"]) == 0


def test_integers_in_gguf_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As bytes; a type that has no values outside of llama.cpp is an error."""
    types = {"a": None, "b": None, "c": gguf.GGMLQuantizationType.Q8_K}
    for at, (name, raw) in enumerate(types.items()):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        data = np.full((2, 292), at, np.uint8 if raw else np.int32)
        writer.add_tensor("numbers", data, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    a, b, c = (str(tmp_path / f"{name}.gguf") for name in types)
    assert run_command(["diff", a, a]) == 0 and run_command(["diff", a, b]) == 1
    assert "numbers: bytes differ" in capsys.readouterr().out
    assert run_command(["diff", c, a]) == 3
    assert "numbers has the type Q8_K, which cannot be converted" in capsys.readouterr().err
