"""`mergeforge gguf` into folders that hold other files: what is there stays, and the receipt covers everything."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest

import mergeforge
from mergeforge.cli import run_command
from mergeforge.errors import OutputError
from mergeforge.execute import executor
from mergeforge.operations import add_gguf, convert_gguf
from mergeforge.planner import Options

SETTINGS: dict[str, Any] = {"device": "cpu", "memory": "32MiB"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def identities(folder: Path) -> dict[str, int]:
    """A file that is written again has another inode."""
    return {path.name: path.stat().st_ino for path in folder.glob("*.gguf")}


def receipt(folder: Path) -> dict[str, Any]:
    """Without what differs from run to run."""
    value: dict[str, Any] = json.loads((folder / "mergeforge.json").read_text())
    return {key: part for key, part in value.items() if key != "run"}


def merge(**output: Any) -> Path:
    recipe = {"base_model": "base", "adapters": ["adapters/a"], "output": {"gguf": ["q8_0"], "name": "m", **output}}
    return mergeforge.merge(recipe, out="merged", **SETTINGS)


def test_a_second_type_gives_the_folder_of_one_conversion_to_both(models: Path) -> None:
    """Every file and the receipt, against `--type q4_k_m --type q8_0`; the first type's file is not written again."""
    mergeforge.convert_to_gguf("base", ["q4_k_m", "q8_0"], out="both", **SETTINGS)
    mergeforge.convert_to_gguf("base", "q4_k_m", out="added", **SETTINGS)
    before = identities(Path("added"))
    mergeforge.convert_to_gguf("base", "q8_0", out="added", **SETTINGS)
    added, both = contents(Path("added")), contents(Path("both"))
    for name in (*("base-Q4_K_M.gguf", "base-Q8_0.gguf"), "Modelfile", "mergeforge.yml"):
        assert added[name] == both[name], name
    assert added["README.md"].replace(b"added", b"both") == both["README.md"] and added.keys() == both.keys()
    one, other = receipt(Path("added")), receipt(Path("both"))
    assert one.pop("files").keys() == other.pop("files").keys() and one == other
    assert before.items() <= identities(Path("added")).items()
    assert run_command(["verify", "added", "--deep", "--all"]) == 0


def test_overwrite_replaces_that_file_only(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mergeforge.convert_to_gguf("base", ["q4_k_m", "q8_0"], out="out", **SETTINGS)
    before = identities(Path("out"))
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "out"]) == 5
    assert "out/base-Q8_0.gguf exists" in capsys.readouterr().err
    assert (
        run_command(["gguf", "base", "--type", "q8_0", "--tensor-type", "ffn_up=f16", "--out", "out", "--overwrite"])
        == 0
    )
    after = identities(Path("out"))
    assert after["base-Q4_K_M.gguf"] == before["base-Q4_K_M.gguf"]
    assert after["base-Q8_0.gguf"] != before["base-Q8_0.gguf"]
    assert run_command(["verify", "out", "--deep", "--all"]) == 0


def test_splits_of_a_replaced_type_are_removed(models: Path) -> None:
    split = ["gguf", "base", "--type", "q8_0", "--split-max-size", "100KB", "--out", "out"]
    assert run_command(split) == 0 and len(identities(Path("out"))) > 2
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "out"]) == 5
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "out", "--overwrite"]) == 0
    assert identities(Path("out")).keys() == {"base-Q8_0.gguf"} and run_command(["verify", "out"]) == 0


@pytest.mark.parametrize("out", ["merged/small.gguf", "merged"])
def test_files_beside_a_merge_are_in_its_receipt(models: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    """verify passes, deep too, and finds damage in the added file."""
    merged = merge()
    before = contents(merged)
    assert run_command(["gguf", "merged", "--type", "q4_0", "--out", out]) == 0
    added = merged / ("small.gguf" if out.endswith(".gguf") else "merged-Q4_0.gguf")
    after = contents(merged)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {added.name, "mergeforge.json", "Modelfile"} and before.keys() <= after.keys()
    assert f"# FROM ./{added.name}\n" in (merged / "Modelfile").read_text()
    assert run_command(["verify", "merged", "--deep", "--all"]) == 0
    data = bytearray(added.read_bytes())
    data[-1] ^= 1
    added.write_bytes(data)
    assert run_command(["verify", "merged"]) == 3
    assert f"{added.name} has changed" in capsys.readouterr().err


def test_a_named_file_stays_when_types_are_added(models: Path) -> None:
    """Files under names of their own, of the same type too, in a folder of conversions and in that of a merge."""
    mergeforge.convert_to_gguf("base", "f16", out="out", **SETTINGS)
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "out/mine.gguf"]) == 0
    mine = Path("out/mine.gguf").read_bytes()
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "out"]) == 0
    assert Path("out/mine.gguf").read_bytes() == mine and run_command(["verify", "out", "--deep", "--all"]) == 0
    assert {"mine.gguf", "base-F16.gguf", "base-Q8_0.gguf"} <= receipt(Path("out"))["files"].keys()
    merge()  # writes m-Q8_0.gguf
    assert run_command(["gguf", "merged", "--type", "q8_0", "--out", "merged"]) == 0
    assert identities(Path("merged")).keys() == {"m-Q8_0.gguf", "merged-Q8_0.gguf"}
    assert run_command(["verify", "merged", "--deep", "--all"]) == 0


def test_an_edited_modelfile_is_kept(models: Path) -> None:
    for out, arguments in (("out", ["base"]), ("merged", ["merged", "--out", "merged"])):
        if out == "out":
            mergeforge.convert_to_gguf("base", "f16", out="out", **SETTINGS)
            arguments = ["base", "--out", "out"]
        else:
            merge()
        (Path(out) / "Modelfile").write_text("mine")
        assert run_command(["gguf", *arguments, "--type", "q4_0"]) == 0
        assert (Path(out) / "Modelfile").read_text() == "mine"


def test_a_merged_file_can_be_replaced(models: Path) -> None:
    """By one of another kind: deep verification then compares only what the recipe still describes."""
    merge(name="merged")
    assert run_command(["gguf", "merged", "--type", "q8_0", "--out", "merged", "--overwrite"]) == 0
    assert run_command(["verify", "merged", "--deep", "--all"]) == 0


def test_a_model_folder_gets_the_file_and_a_modelfile(models: Path) -> None:
    before = contents(Path("base"))
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "base"]) == 0
    assert contents(Path("base")).keys() - before.keys() == {"base-Q8_0.gguf", "Modelfile"}
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "base/x.gguf"]) == 0
    after = contents(Path("base"))
    assert before.items() <= after.items() and after["x.gguf"] == after["base-Q8_0.gguf"]


@pytest.mark.parametrize("out", ["out", "out/base-Q8_0.gguf"])
def test_an_interrupted_conversion_leaves_the_files_and_is_resumed(
    models: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """Stopped after some tiles, and in its last step; the result is that of an uninterrupted conversion."""
    mergeforge.convert_to_gguf("base", ["q4_k_m", "q8_0"], out="out", **SETTINGS)
    before = contents(Path("out"))
    options = Options(device="cpu", memory="32MiB", threads=1)
    settings = {"tensor_types": {"ffn_up": "f16"}}

    def conversion() -> convert_gguf.GGUFConversion:
        return convert_gguf.plan_conversion("base", ["q8_0"], out, settings, options, overwrite=True)

    tiles = convert_gguf.convert(conversion(), overwrite=True)
    for _ in range(5):
        next(tiles)
    tiles.close()
    assert {name: data for name, data in contents(Path("out")).items() if ".mergeforge/" not in name} == before
    with monkeypatch.context() as patched:
        patched.setattr(add_gguf, "write_durably", _fail)
        with pytest.raises(OutputError):
            deque(convert_gguf.convert(conversion(), overwrite=True), maxlen=0)
    with monkeypatch.context() as patched:
        patched.setattr(executor, "compute_tiles", _fail)  # all files are written: nothing is computed
        deque(convert_gguf.convert(conversion(), overwrite=True), maxlen=0)
    assert run_command(["verify", "out", "--deep", "--all"]) == 0
    after = contents(Path("out"))
    assert after.keys() == before.keys() and after["base-Q4_K_M.gguf"] == before["base-Q4_K_M.gguf"]
    assert after["base-Q8_0.gguf"] != before["base-Q8_0.gguf"]


def test_an_edited_card_is_kept(models: Path) -> None:
    mergeforge.convert_to_gguf("base", "q8_0", out="out", **SETTINGS)
    (Path("out") / "README.md").write_text("mine")
    mergeforge.convert_to_gguf("base", "f16", out="out", **SETTINGS)
    assert (Path("out") / "README.md").read_text() == "mine" and run_command(["verify", "out"]) == 0


def _fail(*arguments: Any, **keywords: Any) -> None:
    raise OutputError("stopped")
