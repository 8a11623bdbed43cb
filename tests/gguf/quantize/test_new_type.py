"""A quant type is one file: a module added to the package is found, listed, and can be written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.llama_cpp_tools import read

from mergeforge.operations.synthetic_models import SHAPES, write_model

# Q8_0 under another name, with its number, so that the gguf package can read it. The C library has no type of that
# name, so torch encodes it.
MODULE = """
from mergeforge.gguf.file_types import FileType, register_file_type
from mergeforge.gguf.quantize import QuantType, register
from mergeforge.gguf.quantize.q8_0 import quantize_torch

register(QuantType("Q8_X", 8, 32, 34, quantize_torch))
register_file_type(FileType("Q8_X_FILE", 7, "Q8_X"))
"""
RUN = """
import json, sys
from mergeforge.gguf import quantize
quantize.__path__.append(sys.argv[1])
from mergeforge.cli import run_command
sys.exit(run_command(json.loads(sys.argv[2])))
"""


def run(modules: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A mergeforge command in a process whose package `quantize` has one more folder of modules."""
    command = [sys.executable, "-c", RUN, str(modules), json.dumps(arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_file_adds_a_tensor_type_and_a_file_type(tmp_path: Path) -> None:
    """Through the command line: the bytes of the new types against those of q8_0."""
    modules, model = tmp_path / "modules", tmp_path / "model"
    modules.mkdir()
    (modules / "q8_x.py").write_text(MODULE)
    write_model(model, SHAPES["tiny"])
    options = ("--device", "cpu", "--threads", "1")
    for arguments in (("--type", "q8_x_file"), ("--type", "f16", "--tensor-type", "ffn_down=Q8_X"), ("--type", "q8_0")):
        done = run(modules, "gguf", str(model), *arguments, "--out", str(tmp_path / arguments[1]), *options)
        assert done.returncode == 0, done.stderr
    assert "q8_x_file" in run(modules, "list", "quants").stdout
    files = {name: read(next((tmp_path / name).glob("*.gguf"))).tensors for name in ("q8_x_file", "f16", "q8_0")}
    name = "blk.0.ffn_down.weight"
    assert files["f16"][name] == files["q8_x_file"][name] == files["q8_0"][name]
    assert files["f16"]["blk.0.ffn_up.weight"][0] == "F16"
    refused = subprocess.run([sys.executable, "-m", "mergeforge", "gguf", str(model), "--type", "q8_x_file"])
    assert refused.returncode == 2
