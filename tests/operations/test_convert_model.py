"""A GGUF file as a Hugging Face folder: against the model that it was made from, transformers and ggml's values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from support.gguf_models import TINY, VOCAB, Tiny, make, stored_shapes
from support.gguf_round_trip import CHANGED, NOT_WRITTEN, ONE_WAY, OTHER_NAMES, from_gguf, to_gguf

import mergeforge
from mergeforge.cli import run_command
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.gguf.architectures import build_spec
from mergeforge.gguf.reader import read_gguf

SAMPLE = ("llama", "llama3", "mixtral", "gpt2", "gpt-oss", "gemma2", "deepseek3", "qwen3next", "falcon", "bert")
SAMPLE += ("mamba2", "lfm2", "stablelm-norms", "phi-three-long", "llama4")
TINY_BY_NAME = {tiny.name: tiny for tiny in TINY}
MODELS = [
    pytest.param(tiny, id=tiny.name, marks=() if tiny.name in SAMPLE else pytest.mark.slow)
    for tiny in TINY
    if tiny.name not in {**NOT_WRITTEN, **ONE_WAY}
]


def round_trip(tiny: Tiny, root: Path) -> tuple[Path, Path, Path]:
    """The model's folder, its F32 GGUF file, and the folder made from the file."""
    folder = make(tiny, root / tiny.name)
    file = to_gguf(folder, root / f"{tiny.name}.gguf")
    return folder, file, from_gguf(file, root / "back")


@pytest.mark.parametrize("tiny", MODELS)
def test_every_architecture_comes_back_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    """HF -> F32 GGUF -> HF: all tensors that GGUF holds. Those with other names become the same GGUF file again."""
    folder, file, back = round_trip(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    infos = {name: TensorInfo(name, "F32", shape) for name, shape in stored_shapes(folder).items()}
    held = build_spec(config, infos).targets.keys()
    stored, restored = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    if tiny.name in OTHER_NAMES:
        again = read_gguf(to_gguf(back, tmp_path / "again.gguf"))
        assert values(again.tensors) == values(read_gguf(file).tensors)
        return
    assert restored.keys() == held
    different = [name for name in held if not stored[name].float().equal(restored[name].float())]
    assert different == [] or tiny.name in CHANGED


def values(tensors: dict[str, object]) -> dict[str, bytes]:
    """The bytes of every tensor."""
    found = {}
    for name, stored in tensors.items():
        raw = bytearray(stored.nbytes)  # type: ignore[attr-defined]
        stored.file.read_into(memoryview(raw), stored.offset)  # type: ignore[attr-defined]
        found[name] = bytes(raw)
    return found


# What transformers cannot load or compute even from the original folder, or computes from weights drawn at random.
UNCOMPARED = ("llama-longrope", "glm4v", "glm4vmoe", "minimax-m2", "minicpm3", "paddleocr", "hunyuan-vl", *OTHER_NAMES)

COMPARED = [tiny.name for tiny in TINY if tiny.kind and tiny.name not in (*UNCOMPARED, *NOT_WRITTEN)]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    """The original folder and the one made from its F32 GGUF file, in transformers: equal logits, so equal losses."""
    import transformers
    from support.quiet import quiet

    tiny = TINY_BY_NAME[name]
    folder, _, back = round_trip(tiny, tmp_path)
    names = [json.loads((path / "config.json").read_text())["architectures"][0] for path in (folder, back)]
    if not all(hasattr(transformers, name) for name in names):
        pytest.skip(f"transformers has no {names[0]}")
    tokens, outputs = torch.arange(3, 40)[None], []
    for name, path in zip(names, (folder, back), strict=True):
        with quiet(), torch.no_grad():
            torch.manual_seed(0)
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            model = getattr(transformers, name).from_pretrained(path, **options).eval()
            answer = model(input_ids=tokens)
        outputs.append(answer["logits"] if "logits" in answer else answer["last_hidden_state"])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6 if tiny.name in CHANGED else 0, rtol=0)


# Families that transformers 5.24 reads from GGUF. Of others that it names (Qwen 3, GPT-2, Falcon, ...) it derives sizes
# that the tiny models do not have, and Mamba's A_log is not exact in its result.
READ_BY_TRANSFORMERS = ["llama-tied", "mistral", "qwen2", "gemma2", "gemma3", "phi-three", "starcoder2", "stablelm"]
READ_BY_TRANSFORMERS += ["nemotron", "minimax-m2", "bloom", "lfm2"]


@pytest.mark.parametrize(
    ("name", "type_"),
    [("llama-tied", "bf16"), ("llama-tied", "q4_k_m")]
    + [pytest.param(name, "q8_0", marks=pytest.mark.slow) for name in READ_BY_TRANSFORMERS],
)
def test_weights_equal_transformers_own_gguf_loading(name: str, type_: str, tmp_path: Path) -> None:
    """from_pretrained(gguf_file=...) in float32, against the converted folder in float32, loaded by transformers."""
    from support.quiet import quiet
    from transformers import AutoModelForCausalLM

    folder = make(TINY_BY_NAME[name], tmp_path / name)
    file = to_gguf(folder, tmp_path / "model.gguf", type_)
    back = from_gguf(file, tmp_path / "back", "float32")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file, alone)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(alone, gguf_file=file.name, dtype=torch.float32)
        ours = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).state_dict()
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss", "deepseek3", "llama4", "qwen35"])
@pytest.mark.parametrize("type_", ["q8_0", "q4_0"])
def test_quantized_values_are_ggmls_wherever_they_stand(name: str, type_: str, tmp_path: Path) -> None:
    """A quantized file turned back and written as F32, against its own tensors dequantized by the gguf package."""
    folder = make(TINY_BY_NAME[name], tmp_path / name)
    quantized = to_gguf(folder, tmp_path / "quantized.gguf", type_)
    restored = from_gguf(quantized, tmp_path / "back", "float32")
    again = read_gguf(to_gguf(restored, tmp_path / "again.gguf"))
    stored = read_gguf(quantized)
    for key, raw in values(stored.tensors).items():
        kind = gguf.GGMLQuantizationType[stored.tensors[key].ggml_type]
        tensor = stored.tensors[key]
        rows = np.frombuffer(raw, np.uint8).reshape(-1, tensor.row_nbytes(tensor.shape[-1]))
        expected = gguf.quants.dequantize(rows, kind).astype("<f4")
        found = np.frombuffer(values({key: again.tensors[key]})[key], "<f4")
        assert np.allclose(found, expected.reshape(-1), rtol=0, atol=2e-7), key


def test_dtypes_are_kept_and_quantized_tensors_become_float16(tmp_path: Path) -> None:
    """F16 and BF16 matrices and F32 norms stay; --dtype sets one for all, and config.json names it."""
    folder = make(TINY_BY_NAME["llama-tied"], tmp_path / "model")
    kept = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "q8_0": "float16"}
    for type_, dtype in kept.items():
        file = to_gguf(folder, tmp_path / f"{type_}.gguf", type_)
        back = from_gguf(file, tmp_path / type_)
        tensors = load_file(back / "model.safetensors")
        assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == getattr(torch, dtype)
        assert tensors["model.norm.weight"].dtype == torch.float32
        assert json.loads((back / "config.json").read_text())["dtype"] == dtype
    assert run_command(["convert", str(file), "--out", str(tmp_path / "set"), "--dtype", "bfloat16", "-q"]) == 0
    tensors = load_file(tmp_path / "set" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("type_", ["f16", "q8_0", "q4_0"])
def test_bytes_do_not_depend_on_memory_or_threads(type_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed matrices of several blocks, read in small pieces and at once; F16 is also what the model has."""
    from mergeforge.checkpoints import gguf_rows

    sizes = {"vocab_size": VOCAB, "n_embd": 768, "n_head": 4, "n_layer": 1, "n_positions": 64}
    tiny = Tiny("wide", "gpt2", sizes, extra={"n_ctx": 64}, dtype="bfloat16")
    folder = make(tiny, tmp_path / "model")
    file = to_gguf(folder, tmp_path / "model.gguf", type_)
    outputs = []
    for memory, threads, nbytes in (("40MiB", 2, 10_000), ("1GiB", 1, 1 << 20)):
        monkeypatch.setattr(gguf_rows, "READ_NBYTES", nbytes)
        out = mergeforge.convert_from_gguf(file, out=tmp_path / memory, memory=memory, threads=threads, device="cpu")
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    if type_ == "f16":
        stored, restored = (load_file(path / "model.safetensors") for path in (folder, out))
        assert [name for name in stored if not stored[name].float().equal(restored[name].float())] == []


def test_a_gguf_file_alone_is_the_base_of_a_lora(tmp_path: Path) -> None:
    """A LoRA folded into the F32 GGUF file of its base, against one folded into the folder of its base."""
    from support.small_models import make_adapter

    folder = make(TINY_BY_NAME["llama-tied"], tmp_path / "model")
    file = to_gguf(folder, tmp_path / "model.gguf")
    lora = make_adapter(folder, tmp_path / "lora")
    recipes = [{"base_model": str(base), "adapters": [str(lora)]} for base in (folder, file)]
    outs = [mergeforge.run(recipe, out=tmp_path / f"out{at}", device="cpu").folder for at, recipe in enumerate(recipes)]
    merged = [load_file(out / "model.safetensors") for out in outs]
    assert merged[0].keys() == merged[1].keys()
    assert all(merged[0][name].equal(merged[1][name]) for name in merged[0])
    assert (outs[1] / "tokenizer.json").is_file() and (outs[1] / "config.json").is_file()


def test_splits_are_read_as_one_model_and_a_missing_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(TINY_BY_NAME["llama-tied"], tmp_path / "model")
    whole = from_gguf(to_gguf(folder, tmp_path / "model.gguf"), tmp_path / "whole")
    assert run_command(["gguf", str(folder), "--type", "f32", "--split-max-size", "2MB", "--out", str(tmp_path / "s"),
                        "--pre", "gpt-2", "-q"]) == 0  # fmt: skip
    splits = sorted((tmp_path / "s").glob("*-of-*.gguf"))
    assert len(splits) > 1
    parts = from_gguf(splits[0], tmp_path / "parts")
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    splits[-1].unlink()
    assert run_command(["convert", str(splits[0]), "--out", str(tmp_path / "none")]) == 3
    assert splits[-1].name in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_damaged_files_are_refused_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncated, of an unknown architecture, without merges, without a vocabulary, and no GGUF file at all."""
    folder = make(TINY_BY_NAME["llama-tied"], tmp_path / "model")
    file = to_gguf(folder, tmp_path / "model.gguf")
    data = file.read_bytes()
    size = (len("llama")).to_bytes(8, "little")
    cases = {
        "truncated": (data[: len(data) // 2], "truncated"),
        "unknown": (data.replace(size + b"llama", size + b"lamma", 1), "lamma"),
        "merges": (data.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.murges", 1), "without merges"),
        "vocabulary": (data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.nodel", 1), "no vocabulary"),
        "no": (b"PK" + data, "not a GGUF file"),
    }
    for name, (content, expected) in cases.items():
        broken = tmp_path / f"{name}.gguf"
        broken.write_bytes(content)
        assert run_command(["convert", str(broken), "--out", str(tmp_path / "out")]) == 3, name
        assert expected in capsys.readouterr().err.replace("\n", " "), name
        assert not (tmp_path / "out").exists()
    assert run_command(["convert", str(folder), "--out", str(tmp_path / "out")]) == 2


def test_inspect_says_what_a_file_holds(tmp_path: Path) -> None:
    folder = make(TINY_BY_NAME["llama-tied"], tmp_path / "model")
    file = to_gguf(folder, tmp_path / "model.gguf", "q8_0")
    sentences = " ".join(mergeforge.inspect(file)["in_words"])
    assert "LlamaForCausalLM" in sentences and "mergeforge convert" in sentences


def test_experts_of_old_files_are_single_tensors(tmp_path: Path) -> None:
    """A Mixtral file as of 2023 (blk.0.ffn_up.3.weight, no file type, linear scaling in one key), against today's."""
    folder = make(TINY_BY_NAME["mixtral"], tmp_path / "model")
    file = to_gguf(folder, tmp_path / "model.gguf")
    old = GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for field in old.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")) and field.name != "tokenizer.ggml.pre":
            kind, *items = field.types
            writer.add_key_value(field.name, field.contents(), kind, items[0] if items else None)
    writer.add_float32("llama.rope.scale_linear", 4.0)
    for tensor in old.tensors:
        parts = list(tensor.data) if "_exps" in tensor.name else [tensor.data]
        for at, part in enumerate(parts):
            writer.add_tensor(tensor.name.replace("_exps", f".{at}"), np.ascontiguousarray(part))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    back = from_gguf(tmp_path / "old.gguf", tmp_path / "back")
    stored, restored = (load_file(path / "model.safetensors") for path in (folder, back))
    assert stored.keys() == restored.keys()
    assert all(stored[name].equal(restored[name]) for name in stored)
    rope = json.loads((back / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
