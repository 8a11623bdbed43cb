"""GGUF to GGUF: against our own conversion from the model's folder, ggml's functions and llama-quantize."""

from __future__ import annotations

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import TINY, folders
from support.imatrix_files import NEED_IMATRIX, write_imatrix
from support.llama_cpp_tools import needs_quantizer, quantize, read

from mergeforge.cli import run_command
from mergeforge.errors import BudgetError, MergeforgeError, OutputError, RecipeError, SourceError
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.operations import convert_gguf
from mergeforge.operations.requantize_gguf import plan_gguf
from mergeforge.planner import Options
from mergeforge.planner.requantize import Requantization

TYPES = ("q4_k_m", "q3_k_l", "iq4_xs", "q5_0", "q8_0", "bf16")
OPTIONS = Options(memory="64MiB", device="cpu", threads=1)
NAMES = ("llama", "mixtral")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every model with its GGUF files: m-F32.gguf, m-Q4_K_M.gguf, ..."""
    root = tmp_path_factory.mktemp("gguf")
    models = folders([tiny for tiny in TINY if tiny.name in NAMES], root / "models")
    for name in NAMES:
        conversion = convert_gguf.plan_conversion(str(models[name][0]), ("f32", *TYPES), str(root / name), {}, OPTIONS)
        deque(convert_gguf.convert(conversion), maxlen=0)
    return {name: root / name for name in NAMES}


def requantized(source: Path, out: Path, *types: str, request: Requantization | None = None, **settings: Any) -> Path:
    """The first file that a GGUF file becomes."""
    planned = plan_gguf(str(source), types, str(out), settings, request or Requantization(), OPTIONS)
    deque(convert_gguf.convert(planned), maxlen=0)
    return planned.files[0]


@pytest.mark.parametrize("name", NAMES)
def test_file_equals_the_one_from_the_model(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Byte by byte: the F32 file in other types, all at once, and the model's folder converted to these types."""
    requantized(files[name] / f"{name}-F32.gguf", tmp_path, *TYPES)
    different = [
        type_
        for type_ in TYPES
        if FILE_TYPES[type_].by_llama_quantize
        and (tmp_path / f"{name}-{FILE_TYPES[type_].label}.gguf").read_bytes()
        != (files[name] / f"{name}-{FILE_TYPES[type_].label}.gguf").read_bytes()
    ]
    assert different == []
    assert not list(tmp_path.glob(".*"))


def test_types_that_need_an_imatrix_are_refused_without(files: dict[str, Path], tmp_path: Path) -> None:
    """As llama-quantize does: without one, and with one that lacks a tensor."""
    source, imatrix = files["llama"] / "llama-F32.gguf", tmp_path / "imatrix.dat"
    with pytest.raises(
        RecipeError, match=r"blk\.0\.\w+\.weight becomes Q2_K, which needs an imatrix, but there is none"
    ):
        requantized(source, tmp_path / "out", "q2_k_s")
    write_imatrix(source, imatrix)
    requantized(source, tmp_path / "out", "q2_k_s", imatrix=str(imatrix))
    write_imatrix(source, imatrix, without="blk.1.attn_q.weight")
    with pytest.raises(RecipeError, match=r"blk\.1\.attn_q\.weight .*imatrix\.dat has none for it"):
        requantized(source, tmp_path / "other", "q2_k_s", imatrix=str(imatrix))
    assert not (tmp_path / "other").exists()


def test_mxfp4_moe_of_a_model_without_experts_is_a_warning(files: dict[str, Path], tmp_path: Path) -> None:
    """Every matrix becomes Q8_0; in a model with experts, their stacks become MXFP4."""
    dense, sparse = (
        plan_gguf(
            str(files[name] / f"{name}-F32.gguf"), ["mxfp4_moe"], str(tmp_path), {}, Requantization(), OPTIONS
        ).plan
        for name in NAMES
    )
    assert [warning.split(" ")[0] for warning in dense.warnings] == ["mxfp4_moe"] and not sparse.warnings
    assert "MXFP4" in sparse.ggufs[0].nbytes_by_type and set(dense.ggufs[0].nbytes_by_type) == {"F32", "Q8_0"}


def test_memory_does_not_change_the_file(files: dict[str, Path], tmp_path: Path) -> None:
    """In 16 MiB with 3 threads, against 64 MiB with one."""
    source = files["llama"] / "llama-F32.gguf"
    expected = requantized(source, tmp_path / "a.gguf", "q4_k_m").read_bytes()
    options = Options(memory="16MiB", device="cpu", threads=3)
    planned = plan_gguf(str(source), ["q4_k_m"], str(tmp_path / "b.gguf"), {}, Requantization(), options)
    assert planned.plan.peak <= 16 << 20
    deque(convert_gguf.convert(planned), maxlen=0)
    assert (tmp_path / "b.gguf").read_bytes() == expected


def test_quantized_tensors_are_dequantized_as_ggml_does(files: dict[str, Path], tmp_path: Path) -> None:
    """Every tensor that changes its type: ggml's dequantize_row_* and ggml_quantize_chunk on the source's bytes."""
    from support.ggml_reference import ggml_dequantize, ggml_quantize

    from mergeforge.gguf.quantize import QUANT_TYPES

    for label in ("Q4_K_M", "IQ4_XS", "Q5_0"):
        source = files["llama"] / f"llama-{label}.gguf"
        out = requantized(source, tmp_path / label, "q2_k", request=Requantization(allow_requantize=True))
        before, after = read(source), read(out)
        changed = 0
        for name, (kind, shape, data) in after.tensors.items():
            old_kind, _, old_data = before.tensors[name]
            if kind == old_kind:
                assert data == old_data
            else:
                values = ggml_dequantize(old_kind, old_data, int(np.prod(shape))).reshape(-1, shape[-1])
                assert ggml_quantize(QUANT_TYPES[kind], values).tobytes() == data, name
                changed += 1
        assert changed > 5


def test_quantized_file_is_requantized_only_on_request(files: dict[str, Path], tmp_path: Path) -> None:
    source = files["llama"] / "llama-Q4_K_M.gguf"
    with pytest.raises(SourceError, match="Q4_K") as error:
        requantized(source, tmp_path / "x.gguf", "q2_k")
    assert "allow_requantize" in str(error.value.hint)
    assert list(tmp_path.iterdir()) == []
    request = Requantization(allow_requantize=True)
    planned = plan_gguf(str(source), ["q2_k"], str(tmp_path / "x.gguf"), {}, request, OPTIONS)
    assert any("worse" in note for note in planned.plan.notes)


def test_file_is_split_joined_and_split_as_it_was(files: dict[str, Path], tmp_path: Path) -> None:
    """Splits joined again equal the file; with keep_split each split has the tensors of the source's."""
    source = files["llama"] / "llama-BF16.gguf"
    whole = requantized(source, tmp_path / "whole.gguf")
    first = requantized(source, tmp_path / "split", split_max_size="500KB")
    assert first.name == "llama-BF16-00001-of-00007.gguf"
    assert requantized(first, tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()
    kept = requantized(first, tmp_path / "kept", "q4_k_m", request=Requantization(keep_split=True))
    for path in sorted(kept.parent.glob("*.gguf")):
        original = read(first.with_name(path.name.replace("Q4_K_M", "BF16")))
        assert list(read(path).tensors) == list(original.tensors)
        assert read(path).keys["split.no"] == original.keys["split.no"]
    joined = read(requantized(kept, tmp_path / "again.gguf")).tensors
    assert joined == read(requantized(whole, tmp_path / "q4.gguf", "q4_k_m")).tensors
    first.with_name("llama-BF16-00003-of-00007.gguf").unlink()
    with pytest.raises(SourceError, match="00003-of-00007"):
        requantized(first, tmp_path / "y.gguf", "q4_k_m")
    shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(SourceError, match="one of 7 splits"):
        requantized(tmp_path / "renamed.gguf", tmp_path / "y.gguf", "q4_k_m")
    with pytest.raises(RecipeError, match="exclude"):
        requantized(kept, tmp_path / "z", "q8_0", request=Requantization(keep_split=True), split_max_size="1MB")


def test_metadata_is_edited_and_tensors_are_copied(files: dict[str, Path], tmp_path: Path) -> None:
    """Keys keep their types; the tensors keep their bytes."""
    (tmp_path / "chat.jinja").write_text("{{ messages }}", "utf-8")
    source = files["llama"] / "llama-Q4_K_M.gguf"
    edits = ["general.name=Aurora", "llama.context_length=77", "my.flag=true", "my.size=u64:5", "my.text=a=b"]
    options = [part for edit in edits for part in ("--set-metadata", edit)]
    out = str(tmp_path / "edited.gguf")
    command = ["gguf", str(source), *options, "--chat-template", str(tmp_path / "chat.jinja"), "--out", out, "-q"]
    assert run_command(command) == 0
    before, after = read(source), read(Path(out))
    assert after.tensors == before.tensors
    changed = {key: value for key, value in after.keys.items() if before.keys.get(key) != value}
    assert changed == {
        "general.name": (("STRING",), "Aurora"),
        "llama.context_length": (("UINT32",), 77),
        "my.flag": (("BOOL",), True),
        "my.size": (("UINT64",), 5),
        "my.text": (("STRING",), "a=b"),
        "tokenizer.chat_template": (("STRING",), "{{ messages }}"),
    }
    assert before.keys.keys() - after.keys.keys() == set()
    for edit in (
        "general.architecture=qwen2",
        "llama.context_length=many",
        "split.no=1",
        "name",
        "tokenizer.ggml.tokens=[]",
        "llama.rope.freq_base=NaN",
        "llama.rope.freq_base=1e999",
        "general.name=\udcff",
    ):
        assert run_command(["gguf", str(source), "--set-metadata", edit, "--out", str(tmp_path / "no.gguf")]) == 2
    assert not (tmp_path / "no.gguf").exists()


def test_bad_files_are_refused_and_nothing_is_written(files: dict[str, Path], tmp_path: Path) -> None:
    import gguf

    data = (files["llama"] / "llama-F32.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-5000])
    (tmp_path / "header.gguf").write_bytes(data[:3000])
    (tmp_path / "text.gguf").write_bytes(b"hello" * 99)
    for name, tensor in (("nan", np.full((4, 256), np.nan, np.float32)), ("ints", np.zeros((4, 256), np.int32))):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_tensor("token_embd.weight", tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("token_embd.weight.lora_a", np.zeros((4, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = sorted(tmp_path.iterdir())
    wrong = {"cut": "truncated", "header": "truncated", "text": "not a GGUF", "ints": "I32", "lora": "adapter"}
    for name, message in {**wrong, "gone": "does not exist"}.items():
        with pytest.raises(MergeforgeError, match=message):
            requantized(tmp_path / f"{name}.gguf", tmp_path / "out.gguf", "q4_k_m")
    with pytest.raises(SourceError, match=r"token_embd\.weight would hold nan"):
        requantized(tmp_path / "nan.gguf", tmp_path / "nan-out.gguf", "q8_0")
    assert [path for path in sorted(tmp_path.iterdir()) if path not in before] == [
        tmp_path / ".nan-out.gguf.mergeforge"
    ]
    with pytest.raises(BudgetError):
        plan_gguf(str(files["llama"] / "llama-F32.gguf"), ["q8_0"], None, {}, Requantization(), Options(memory="1MB"))
    shutil.copy(files["llama"] / "llama-F32.gguf", tmp_path / "there.gguf")
    with pytest.raises(OutputError, match="exists"):
        requantized(files["llama"] / "llama-F32.gguf", tmp_path / "there.gguf", "q8_0")


def test_command_writes_beside_the_model(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(files["llama"] / "llama-F32.gguf", "aurora-f32.gguf")
    assert run_command(["gguf", "aurora-f32.gguf", "--type", "q4_k_m", "--json"]) == 0
    (written,) = json.loads(capfd.readouterr().out)["files"]
    assert Path(written).name == "aurora-Q4_K_M.gguf" and Path(written).is_file()
    assert run_command(["gguf", "aurora-f32.gguf", "--type", "q4_k_m", "--plan"]) == 5
    assert "--overwrite" in capfd.readouterr().err


QUANTIZED = ["llama", "mixtral", "gpt2", "falcon", "gemma2", "qwen3moe", "deepseek3"]


@pytest.mark.slow
@needs_quantizer
@pytest.mark.parametrize("name", QUANTIZED)
def test_files_equal_llama_quantizes(name: str, tmp_path: Path) -> None:
    """Byte by byte: every type from BF16, every type again to some, joined splits, kept splits, a copy, an imatrix."""
    models = folders([tiny for tiny in TINY if tiny.name == name], tmp_path / "model")
    conversion = convert_gguf.plan_conversion(str(models[name][0]), ["bf16"], str(tmp_path / "from"), {}, OPTIONS)
    deque(convert_gguf.convert(conversion), maxlen=0)
    source, again, different = conversion.files[0], Requantization(allow_requantize=True), []

    def compare(source: Path, type_: str, what: str) -> Path:
        number = FILE_TYPES[type_].number
        theirs = tmp_path / f"{what}-theirs.gguf"
        assert quantize(source, theirs, number, allow_requantize=True) == 0
        ours = requantized(source, tmp_path / f"{what}.gguf", type_, request=again)
        different.extend([what] * (ours.read_bytes() != theirs.read_bytes()))
        return theirs

    for type_ in [type_ for type_ in FILE_TYPES if type_ not in NEED_IMATRIX]:
        theirs = compare(source, type_, type_)
        for second in ("f16", "q2_k", "q4_k_m", "iq4_xs"):
            compare(theirs, second, f"{type_}-{second}")
    assert quantize(source, tmp_path / "copy.gguf", 0, only_copy=True) == 0
    assert requantized(source, tmp_path / "ours-copy.gguf").read_bytes() == (tmp_path / "copy.gguf").read_bytes()
    first = requantized(source, tmp_path / "split", split_max_size="400KB")
    compare(first, "q4_k_m", "joined")
    (tmp_path / "kept").mkdir()
    assert quantize(first, tmp_path / "kept" / "x", FILE_TYPES["q4_k_m"].number, keep_split=True) == 0
    kept = requantized(first, tmp_path / "ours-kept", "q4_k_m", request=Requantization(keep_split=True))
    ours, theirs_kept = sorted(kept.parent.glob("*.gguf")), sorted((tmp_path / "kept").iterdir())
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs_kept]
    assert different == []
