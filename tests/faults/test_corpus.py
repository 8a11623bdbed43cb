"""Every malformed file is refused with an error of ours, and nothing is written: no traceback, no wrong acceptance."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.faults.corpus import Case, cases, write

import mergeforge
from mergeforge.cli import run_command
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

CASES = list(cases())
RECIPES = {
    "index": "merge_method: passthrough\nmodels: [sharded]\n",
    "gguf alone": "merge_method: passthrough\nmodels: [model.gguf]\n",
    "gguf": "merge_method: linear\nparameters: {weight: 1}\nmodels: [base, model.gguf]\n",
}
FOLD = "base_model: base\nadapters: [legal]\n"
# Odd, and yet right.
FINE = {
    "safetensors: an unknown field": "safetensors itself reads past it",
    "safetensors: the norm has another name": "a model of one's own may call it so",
    "safetensors: a name that is empty": "no rule of the format forbids it",
    "gguf: a byte too many": "llama.cpp pads the last tensor, too",
    "gguf alone: a byte too many": "llama.cpp pads the last tensor, too",
    "gguf alone: another hidden size": "the tensors say it, and heads have a size of their own",
}


@pytest.fixture(scope="module")
def good(disk: Path) -> Path:
    """A model, the same in shards and as GGUF, and an adapter."""
    folder = disk / "good"
    write_model(folder / "base", SHAPES["tiny"], seed=0)
    write_adapter(folder / "legal", SHAPES["tiny"], str(folder / "base"), rank=4, seed=1)
    recipe = {"merge_method": "passthrough", "models": [str(folder / "base")]}
    mergeforge.merge(recipe | {"output": {"shard_size": 200_000}}, out=folder / "sharded")
    mergeforge.merge(recipe | {"output": {"gguf": "f16", "safetensors": False}}, out=folder / "gguf")
    shutil.copy(next((folder / "gguf").glob("*.gguf")), folder / "model.gguf")
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "place"
    shutil.copytree(good, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    return folder


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 150 and len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_malformed_files_are_refused(place: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    changed = place / case.file
    data = changed.read_bytes() if changed.exists() else b""
    changed.unlink(missing_ok=True)
    changed.write_bytes(data)
    write(case, place)
    recipe = place / "recipe.yaml"
    if case.kind != "recipe":
        recipe.write_text(RECIPES.get(case.kind, FOLD))
    where = [] if b"output: {path" in recipe.read_bytes() else ["--out", "out"]
    code = run_command(["run", str(recipe), "-q", *where])
    told = capsys.readouterr().err
    if str(case) in FINE:
        assert code in (0, 3)
        return
    assert code in (2, 3, 5), f"accepted, or a bug: {code} {told}"
    assert told.startswith("error: ") and "Traceback" not in told
    assert not list(place.glob("out/*.safetensors")) and not (place / "out" / "mergeforge.json").exists()
