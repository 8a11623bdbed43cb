"""torch pickles: refused unless allowed, never run, and read correctly."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.checkpoints.pickle_reader import read_pickled
from mergeforge.errors import SourceError
from mergeforge.execute import executor
from mergeforge.planner import make_plan


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def assert_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors, _ = read_pickled(path)
    assert tensors.keys() == expected.keys()
    data = path.read_bytes()
    for name, tensor in expected.items():
        stored = tensors[name]
        assert stored.info.shape == tuple(tensor.shape)
        raw = data[stored.offset : stored.offset + stored.info.nbytes]
        assert raw == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_refuses_pickles_unless_allowed(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model.bin", {"a": torch.ones(3)})
    with pytest.raises(SourceError, match="is a pickle") as caught:
        open_checkpoint(tmp_path, "x")
    assert "allow_pickle=True" in caught.value.hint
    assert open_checkpoint(tmp_path, "x", allow_pickle=True).tensors.keys() == {"a"}


@pytest.mark.parametrize("where", ["value", "beside", "key"])
@pytest.mark.parametrize("old", [False, True])
def test_never_runs_code(tmp_path: Path, where: str, old: bool) -> None:
    evil = Evil(f"touch {tmp_path}/PWNED")
    value: dict[Any, Any] = {"a": torch.ones(3)}
    value |= {"value": {"b": evil}, "beside": {"a": [evil]}, "key": {("x",): evil}}[where]
    saved(tmp_path / "pytorch_model.bin", value, _use_new_zipfile_serialization=not old)
    for allowed in (False, True):
        with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
            open_checkpoint(tmp_path, "x", allow_pickle=allowed)
    assert not (tmp_path / "PWNED").exists()


def test_never_loads_a_plain_pickle(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": Evil(f"touch {tmp_path}/PWNED")}))
    with pytest.raises(SourceError, match="is not a zip file"):
        open_checkpoint(tmp_path, "x", allow_pickle=True)
    assert not (tmp_path / "PWNED").exists()


def test_reads_storages_views_and_dtypes(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    expected = {
        "first": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 9).bfloat16(),
        "double": torch.randn(3).double(),
        "whole": shared,
        "view": shared[2:],
        "flat": shared.view(-1)[6:12],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "none of it": shared[:0],
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "small": torch.randn(8).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)).data,
    }
    assert_reads(saved(tmp_path / "x.bin", expected), expected)


def test_reads_parameters_and_a_state_dict(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    path = saved(tmp_path / "x.bin", {"state_dict": {"w": weight}, "step": 3})
    assert_reads(path, {"w": weight.detach()})


def test_unused_storages_do_not_shift_offsets(tmp_path: Path) -> None:
    """An optimizer tensor of the same size precedes the weight."""
    weight = torch.randn(8)
    value = {"optimizer": {"m": [torch.randn(8), (torch.randn(8),)]}, "state_dict": {"w": weight}, "v": torch.randn(8)}
    assert_reads(saved(tmp_path / "x.bin", value), {"w": weight})


def test_reads_empty_files_and_tensors(tmp_path: Path) -> None:
    assert read_pickled(saved(tmp_path / "x.bin", {}))[0] == {}
    assert_reads(saved(tmp_path / "y.bin", {"e": torch.empty(0)}), {"e": torch.empty(0)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.ones(3, 4).T}, "'a' is not contiguous"),
        ({"a": 1}, "does not hold a mapping of names to tensors"),
        ([torch.ones(2)], "does not hold a mapping of names to tensors"),
        ({1: torch.ones(2)}, "does not hold a mapping of names to tensors"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is torch.float32 .torch.sparse_coo"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "'a' is torch.complex128"),
    ],
)
def test_refuses_what_safetensors_cannot_hold(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_pickled(saved(tmp_path / "x.bin", value))


def test_refuses_the_old_format(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match="old format") as caught:
        read_pickled(path)
    assert "save it again" in caught.value.hint


def test_refuses_compressed_or_damaged_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"a": torch.ones(300)})
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    for content in (
        packed.read_bytes(),
        path.read_bytes()[:400],
        path.read_bytes()[200:],
        b"PK\x05\x06" + bytes(18),
        b"",
    ):
        (tmp_path / "broken.bin").write_bytes(content)
        with pytest.raises(SourceError, match=r"broken\.bin"):
            read_pickled(tmp_path / "broken.bin")


def test_refuses_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="not a regular file"):
        open_checkpoint(tmp_path, "x", allow_pickle=True)


def test_a_merge_from_pickles_equals_one_from_safetensors(models: Path, tmp_path: Path) -> None:
    for name in ("base", "tuned-a"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((models / name / "config.json").read_bytes())
        tensors = load_file(models / name / "model.safetensors")
        half = len(tensors) // 2
        parts = {"pytorch_model-1.bin": list(tensors)[:half], "pytorch_model-2.bin": list(tensors)[half:]}
        weight_map = {}
        for file, names in parts.items():
            saved(folder / file, {key: tensors[key] for key in names})
            weight_map |= dict.fromkeys(names, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def merged(root: Path, out: str, **options: Any) -> bytes:
        models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("base", "tuned-a")]
        executor.run_plan(make_plan({"merge_method": "linear", "models": models}, out=tmp_path / out, **options))
        return (tmp_path / out / "model.safetensors").read_bytes()

    assert merged(tmp_path, "one", allow_pickle=True) == merged(models, "two")
