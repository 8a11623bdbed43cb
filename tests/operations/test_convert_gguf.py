"""GGUF from a merge: in one pass, with any tiling, resumed, verified, split; and GGUF files as inputs."""

from __future__ import annotations

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.llama_cpp_tools import Read, read

import mergeforge
from mergeforge.cli import run_command
from mergeforge.core import tensor_info
from mergeforge.errors import MergeforgeError, RecipeError, SourceError
from mergeforge.execute import executor
from mergeforge.operations import convert_gguf
from mergeforge.planner import Options, tiling

TYPES = ["f32", "bf16", "q8_0", "q4_k_m"]


def recipe(**output: Any) -> dict[str, Any]:
    adapters = [{"adapter": "adapters/a", "weight": 0.5}, "adapters/b"]
    return {"base_model": "base", "adapters": adapters, "output": {"gguf": TYPES, "name": "m", **output}}


def merged(out: str, value: dict[str, Any] | None = None, **options: Any) -> Path:
    return mergeforge.merge(value or recipe(), out=out, **{"device": "cpu", "memory": "32MiB", **options})


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.gguf"))}


def dequantized(file: Read, name: str) -> np.ndarray:
    import gguf

    kind, shape, data = file.tensors[name]
    rows = np.frombuffer(data, dtype=np.uint8).reshape(*shape[:-1], -1)
    found: np.ndarray = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return found.reshape(shape)


def test_gguf_holds_the_merged_float32_values(models: Path) -> None:
    """Not the rounded ones of the bfloat16 checkpoint."""
    wanted = load_file(merged("wide", recipe(gguf=["f32"]) | {"dtype": "float32"}) / "model.safetensors")
    out = merged("out")
    up = "model.layers.1.mlp.up_proj.weight"
    found = dequantized(read(out / "m-F32.gguf"), "blk.1.ffn_up.weight")
    assert np.array_equal(found, wanted[up].numpy())
    assert load_file(out / "model.safetensors")[up].dtype == torch.bfloat16
    stored = dequantized(read(merged("stored", recipe(gguf_from="stored")) / "m-F32.gguf"), "blk.1.ffn_up.weight")
    assert np.array_equal(stored, load_file(out / "model.safetensors")[up].float().numpy())


def test_rotary_rows_are_in_llama_cpps_order(models: Path) -> None:
    out = merged("out", recipe(gguf_from="stored"))
    query = load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    expected = query.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.array_equal(dequantized(read(out / "m-F32.gguf"), "blk.0.attn_q.weight"), expected)


def test_without_safetensors_only_gguf_and_its_companions_are_written(models: Path) -> None:
    out = merged("out", recipe(safetensors=False))
    names = {path.name for path in out.iterdir()}
    assert names == {*files(out), "Modelfile", "README.md", "mergeforge.json", "mergeforge.yml"}
    assert files(out) == files(merged("with"))
    assert (out / "Modelfile").read_text().startswith("FROM ./m-F32.gguf\n")
    assert "| m-Q8_0.gguf | Q8_0 |" in (out / "README.md").read_text()


@pytest.mark.parametrize(("memory", "threads", "tile"), [("16MiB", 1, 1), ("256MiB", 4, 5000), ("17MiB", 2, 20_000)])
def test_any_tiling_gives_the_same_bytes(
    models: Path, monkeypatch: pytest.MonkeyPatch, memory: str, threads: int, tile: int
) -> None:
    """Blocks of 10 rows are no multiple of a head, so rotary rows are written one by one."""
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 640)
    expected = files(merged("whole"))
    monkeypatch.setattr(tiling, "TILE_NBYTES", tile)
    assert files(merged("cut", memory=memory, threads=threads)) == expected


def test_a_merge_to_gguf_is_resumed(models: Path) -> None:
    expected = files(merged("whole"))
    plan = mergeforge.plan(recipe(), out="out", device="cpu", memory="32MiB", threads=1)
    tiles = executor.run_tiles(plan)
    for _ in range(12):
        next(tiles)
    tiles.close()
    journal = Path("out/.mergeforge/journal.jsonl").read_text()
    assert 12 <= journal.count('"tile"') < 20
    damaged = Path("out/.mergeforge/m-Q8_0.gguf")
    first = json.loads(journal.splitlines()[1].partition(" ")[2])["tile"][0]
    tensor_plan = next(planned for planned in plan.tensor_plans if planned.info.name == first)
    encoder = next(encoder for encoder in tensor_plan.encoders if "q8_0" in encoder.key)
    offset = encoder.byte_ranges(0, 1)[0][0]
    data = bytearray(damaged.read_bytes())
    data[offset] ^= 1
    damaged.write_bytes(data)
    assert files(merged("out")) == expected
    assert not Path("out/.mergeforge").exists()


def test_verify_finds_every_kind_of_damage(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = merged("out")
    assert run_command(["verify", "out", "--deep", "--all"]) == 0
    for name, offset in (("m-Q4_K_M.gguf", -200), ("m-F32.gguf", 40)):
        whole = (out / name).read_bytes()
        data = bytearray(whole)
        data[offset] ^= 1
        (out / name).write_bytes(data)
        assert run_command(["verify", "out"]) == 3
        assert name in capsys.readouterr().err
        (out / name).write_bytes(whole)
    (out / "m-Q8_0.gguf").unlink()
    assert run_command(["verify", "out"]) == 3
    assert "m-Q8_0.gguf is missing" in capsys.readouterr().err


def test_verify_finds_damage_in_tensors_computed_from_the_config(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(Path("base/config.json").read_text())
    config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_scaling"]["original_max_position_embeddings"] = 64
    Path("base/config.json").write_text(json.dumps(config))
    (path,) = converted("base", "out", "q8_0")
    assert run_command(["verify", "out"]) == 0
    data = bytearray(path.read_bytes())
    at = data.index(read(path).tensors["rope_freqs.weight"][2])
    data[at] ^= 1
    path.write_bytes(data)
    assert run_command(["verify", "out"]) == 3
    assert "the constants of base-Q8_0.gguf changed" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [24, 600])
def test_verify_checks_the_halves_of_fused_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Blocks of 24 rows lie within a half, blocks of 600 span halves of several experts: chunks of many sizes."""
    from support.gguf_models import TINY, folders

    ((folder, _),) = folders([tiny for tiny in TINY if tiny.name == "granitemoe"], tmp_path).values()
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", rows * 256)
    converted(str(folder), str(tmp_path / "out"), "f16", "q4_k_m")
    assert run_command(["verify", str(tmp_path / "out")]) == 0


def test_split_files_hold_the_tensors_of_the_single_file(models: Path) -> None:
    """As gguf-py splits: all keys in the first file, split.* in each; gguf-py's reader reads every part."""
    whole = read(merged("whole", recipe(gguf=["q8_0"])) / "m-Q8_0.gguf")
    out = merged("out", recipe(gguf=[{"type": "q8_0", "split_max_size": "100KB"}]))
    parts = [read(out / name) for name in sorted(files(out))]
    assert len(parts) > 2 and sorted(files(out))[0] == f"m-Q8_0-00001-of-{len(parts):05d}.gguf"
    assert {name: one for part in parts for name, one in part.tensors.items()} == whole.tensors
    split = [{key: part.keys[key][1] for key in part.keys if key.startswith("split.")} for part in parts]
    for at, keys in enumerate(split):
        assert keys == {"split.no": at, "split.count": len(parts), "split.tensors.count": len(whole.tensors)}
    assert {key: value for key, value in parts[0].keys.items() if not key.startswith("split.")} == whole.keys
    assert run_command(["verify", "out"]) == 0


def test_types_of_single_tensors_can_be_set(models: Path) -> None:
    entry = {"type": "q4_0", "tensor_types": {"ffn_down": "f16"}, "token_embedding_type": "q8_0"}
    kinds = {name: one[0] for name, one in read(merged("out", recipe(gguf=[entry])) / "m-Q4_0.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"


# mergeforge gguf


def converted(model: str, out: str, *types: str, **settings: Any) -> list[Path]:
    options = Options(device="cpu", memory="32MiB")
    conversion = convert_gguf.plan_conversion(model, types, out, settings, options)
    deque(convert_gguf.convert(conversion), maxlen=0)
    return conversion.files


def test_a_finished_model_becomes_the_same_gguf(models: Path) -> None:
    out = merged("m", recipe(gguf_from="stored"))
    for kind, path in zip(TYPES, converted("m", "again", *TYPES), strict=True):
        assert read(path).tensors == read(out / path.name).tensors, kind


def test_out_can_be_a_single_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = converted("base", "x.gguf", "q8_0")
    assert path == Path("x.gguf").absolute() and not Path(".x.gguf.mergeforge").exists()
    assert read(path).keys["general.name"][1] == "Base"
    assert run_command(["gguf", "base", "--type", "q8_0", "--out", "x.gguf"]) == 5
    assert "error: x.gguf exists\n" in capsys.readouterr().err
    assert run_command(["gguf", "base", "--type", "f16", "--out", "x.gguf", "--overwrite"]) == 0
    assert run_command(["gguf", "base", "--type", "f16", "--type", "q8_0", "--out", "y.gguf"]) == 2


def test_the_command_names_its_folder_after_the_model(models: Path) -> None:
    assert run_command(["gguf", "base", "--type", "Q8_0", "--type", "q4_k", "-q"]) == 0
    assert sorted(path.name for path in Path("base-GGUF").glob("*.gguf")) == ["base-Q4_K_M.gguf", "base-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["gguf", "adapters/a", "--type", "q4_k_m"], 2, "a LoRA has no mixed types"),
        (["gguf", "base", "--type", "q9_k"], 2, "unknown GGUF type 'q9_k'"),
        (["gguf", "base", "--pre", "llama-bpr"], 2, "llama-bpr"),
        (["gguf", "base", "--adapter", "adapters/a"], 2, "base is not a GGUF file, and --adapter is for GGUF files"),
        (["gguf", "base.gguf", "--base", "base"], 2, "--base is the base model of a PEFT adapter"),
        (["gguf", "base", "--tensor-type", "attn_v"], 2, "write NAME=TYPE"),
        (["gguf", "base", "--type", "q8_0", "--tensor-type", "attn_v=q7"], 2, "q7"),
        (["gguf", "base", "--imatrix", "nowhere.gguf"], 3, "nowhere.gguf"),
        (["gguf", "nowhere"], 3, "nowhere"),
    ],
)
def test_mistakes(models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str) -> None:
    assert run_command(arguments) == code
    assert said in capsys.readouterr().err
    assert not list(models.glob("*-GGUF"))


def test_incomplete_models_are_refused(models: Path) -> None:
    def change(name: str, **values: Any) -> None:
        path = models / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def refusal() -> str:
        with pytest.raises(MergeforgeError) as caught:
            convert_gguf.plan_conversion("base", ["q8_0"], "out", {}, Options(device="cpu"))
        assert isinstance(caught.value, SourceError) and caught.value.hint
        return str(caught.value)

    (models / "base" / "tokenizer.json").rename("kept.json")
    assert "tokenizer" in refusal()
    shutil.copy("kept.json", models / "base" / "tokenizer.json")
    change("config.json", architectures=["LamaForCausalLM"])
    assert "LamaForCausalLM" in refusal()
    change("config.json", architectures=["LlamaForCausalLM"], rms_norm_eps=None, num_attention_heads=None)
    assert "num_attention_heads" in refusal()
    change("config.json", num_attention_heads="four")
    assert "does not describe a LlamaForCausalLM" in refusal()
    change("config.json", num_attention_heads=4)
    (models / "base" / "config.json").unlink()
    assert "config.json" in refusal()


# GGUF as an input


def test_a_gguf_file_works_as_a_model(models: Path) -> None:
    """F32, Q8_0 and Q4_K_M files of a tuned model averaged with the base, against gguf-py's dequantized values."""
    converted("tuned-a", "files", "f32", "q8_0", "q4_k_m")
    base = load_file("base/model.safetensors")
    for kind in ("F32", "Q8_0", "Q4_K_M"):
        models_ = [{"model": "base", "parameters": {"weight": 0.5}}]
        models_ += [{"model": f"files/tuned-a-{kind}.gguf", "parameters": {"weight": 0.5}}]
        value = {"merge_method": "linear", "models": models_, "dtype": "float32"}
        out = load_file(merged(f"out-{kind}", value, memory="16MiB") / "model.safetensors")
        file = read(Path(f"files/tuned-a-{kind}.gguf"))
        for name, gguf_name, heads in (
            ("model.layers.2.self_attn.k_proj.weight", "blk.2.attn_k.weight", 2),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", 0),
            ("model.norm.weight", "output_norm.weight", 0),
        ):
            tuned = dequantized(file, gguf_name)
            if heads:
                tuned = tuned.reshape(heads, -1, 2, tuned.shape[1]).swapaxes(1, 2).reshape(tuned.shape)
            expected = (base[name].float() + torch.from_numpy(tuned.copy())) / 2
            assert torch.allclose(out[name], expected, rtol=1e-6, atol=1e-9), (kind, name)


def test_gguf_files_are_compared(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the folder they were converted from (F32 is equal, Q8_0 is close), and with each other."""
    converted("tuned-a", "files", "f32", "q8_0")
    f32, q8_0 = "files/tuned-a-F32.gguf", "files/tuned-a-Q8_0.gguf"
    assert run_command(["diff", "tuned-a", f32]) == 0
    assert run_command(["diff", f32, f32]) == 0
    assert run_command(["diff", q8_0, "tuned-a", "--all"]) == 1
    assert "model.layers.0.self_attn.q_proj.weight: values differ  relative 0.00" in capsys.readouterr().out
    assert run_command(["diff", q8_0, f32, "--all"]) == 1
    assert "blk.0.attn_q.weight: values differ  relative 0.00" in capsys.readouterr().out
    assert run_command(["diff", "base", f32]) == 1


def test_inspect_shows_a_gguf_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = converted("base", "x.gguf", "q8_0")
    assert run_command(["inspect", str(path), "-v"]) == 0
    shown = capsys.readouterr().out
    assert "general.architecture: llama" in shown and "blk.0.attn_q.weight  Q8_0 [64, 64]" in shown


def test_gguf_files_merge_without_a_folder(models: Path) -> None:
    """TIES over F32 files of a base and a tuned model, against the same over their folders."""
    names = ("base", "tuned-a")
    for name in names:
        converted(name, f"{name}.gguf", "f32")
    outputs = []
    for ending in ("", ".gguf"):
        base, *others = (name + ending for name in names)
        value = {"merge_method": "ties", "base_model": base, "models": others, "dtype": "float32"}
        outputs.append(
            load_file(
                merged(f"alone{ending}", value | {"parameters": {"density": 0.5, "weight": 1.0}}) / "model.safetensors"
            )
        )
    assert outputs[0].keys() == outputs[1].keys()
    assert all(outputs[0][name].equal(outputs[1][name]) for name in outputs[0])


def test_damaged_gguf_files_are_refused(models: Path) -> None:
    converted("tuned-a", "x.gguf", "q8_0")
    whole = Path("x.gguf").read_bytes()
    value = {"merge_method": "linear", "models": ["base", "x.gguf"], "parameters": {"weight": 1}}
    for cut in (0, 3, 20, 200, 4000, len(whole) - 100_000):
        Path("x.gguf").write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"x\.gguf"):
            mergeforge.plan(value, out="out")
    Path("x.gguf").write_bytes(whole[:8] + b"\xff" * 16 + whole[24:])
    with pytest.raises(SourceError, match="damaged"):
        mergeforge.plan(value, out="out")
    import gguf

    for alignment in (0, 1 << 30):
        writer = gguf.GGUFWriter("x.gguf", "llama")
        writer.add_uint32("general.alignment", alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(SourceError, match=r"general\.alignment"):
            mergeforge.plan(value, out="out")


def test_a_gguf_lora_works_as_an_adapter(models: Path) -> None:
    """The adapter as llama.cpp's convert_lora_to_gguf.py lays it out, against the PEFT one."""
    import gguf

    factors = load_file("adapters/a/adapter_model.safetensors")
    settings = json.loads(Path("adapters/a/adapter_config.json").read_text())
    names = {"q_proj": ("attn_q", 4), "k_proj": ("attn_k", 2), "v_proj": ("attn_v", 0), "o_proj": ("attn_output", 0)}
    names |= {"gate_proj": ("ffn_gate", 0), "up_proj": ("ffn_up", 0), "down_proj": ("ffn_down", 0)}
    writer = gguf.GGUFWriter("a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", settings["lora_alpha"])
    for name, value in factors.items():
        layer, module, which = name.split(".")[4], name.split(".")[6], name.split(".")[7]
        array, (short, heads) = value.float().numpy(), names[module]
        if which == "lora_B" and heads:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"blk.{layer}.{short}.weight.lora_{which[-1].lower()}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for out, adapter in (("peft", "adapters/a"), ("gguf", "a.gguf")):
        merged(out, {"base_model": "base", "adapters": [{"adapter": adapter, "weight": 0.7}], "dtype": "float32"})
    ours, theirs = load_file("gguf/model.safetensors"), load_file("peft/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_imatrix_weights_columns(models: Path) -> None:
    """Against quantizing the whole tensor with the weights of the imatrix."""
    import gguf

    from mergeforge.gguf.quantize import QUANT_TYPES, encode

    weights = np.random.default_rng(0).random((1, 64), dtype=np.float32) + 0.1
    writer = gguf.GGUFWriter("i.gguf", "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", weights)
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (path,) = converted("base", "x.gguf", "q4_0", imatrix="i.gguf")
    file = read(path)
    up = load_file("base/model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    expected = encode(QUANT_TYPES["Q4_0"], up, torch.from_numpy(weights[0])).numpy().tobytes()
    assert file.tensors["blk.0.ffn_up.weight"][2] == expected
    assert file.keys["quantize.imatrix.file"][1] == "i.gguf" and file.keys["quantize.imatrix.chunks_count"][1] == 3


def test_recipes_with_unknown_types_are_refused(models: Path) -> None:
    with pytest.raises(RecipeError, match="q7"):
        mergeforge.plan(recipe(gguf=[{"type": "q8_0", "tensor_types": {5: "q7"}}]), out="out")
    with pytest.raises(RecipeError, match="q4_k_x"):
        mergeforge.plan(recipe(gguf=["q4_k_x"]), out="out")
