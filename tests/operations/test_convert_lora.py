"""A PEFT adapter as a GGUF LoRA: against PEFT's merged model, and convert_lora_to_gguf.py's file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gguf_models import TINY, folders
from support.llama_cpp_tools import TREE, needs_converter, read
from support.quiet import quiet

import mergeforge
from mergeforge.cli import run_command
from mergeforge.errors import OutputError, RecipeError, SourceError

LINEAR = {"target_modules": "all-linear"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LINEAR),
    "gpt2": ("gpt2", LINEAR),
    "phi-three": ("phi-three", LINEAR),
    "falcon": ("falcon", LINEAR),
    "gemma2": ("gemma2", LINEAR),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "k_proj", "gate"]}),
    "embedding": ("qwen2", {"target_modules": ["k_proj", "embed_tokens"]}),
    "ranks": ("llama", {**LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}}),
    "rslora": ("llama", {**LINEAR, "use_rslora": True}),
}
# The script writes one scale for all, and factors of Conv1D layers that do not fit their tensors.
OTHER_IN_THE_SCRIPT = ("gpt2", "ranks", "rslora")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """Of every case: the base, the adapter with random factors, and the model into which PEFT has merged it."""
    import peft
    import transformers

    root = tmp_path_factory.mktemp("adapters")
    bases = folders([tiny for tiny in TINY if tiny.name in {base for base, _ in CASES.values()}], root / "bases")
    made = {}
    for name, (base, settings) in CASES.items():
        folder = bases[base][0]
        with quiet():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **settings))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(root / f"{name}-adapter")
            model.merge_and_unload().save_pretrained(root / f"{name}-merged")
        for file in folder.iterdir():
            if not (root / f"{name}-merged" / file.name).exists() and file.suffix != ".safetensors":
                (root / f"{name}-merged" / file.name).write_bytes(file.read_bytes())
        made[name] = (folder, root / f"{name}-adapter", root / f"{name}-merged")
    return made


@pytest.mark.parametrize("name", CASES)
def test_factors_are_the_change_of_every_tensor(
    adapters: dict[str, tuple[Path, Path, Path]], name: str, tmp_path: Path
) -> None:
    """alpha / r * B A, against the difference of the F32 files of the merged model and the base."""
    base, adapter, merged = adapters[name]
    (path,) = mergeforge.convert_to_gguf(adapter, base=base, out=tmp_path / "lora.gguf")
    before = read(mergeforge.convert_to_gguf(base, "f32", out=tmp_path / "base.gguf", device="cpu")[0]).tensors
    after = read(mergeforge.convert_to_gguf(merged, "f32", out=tmp_path / "merged.gguf", device="cpu")[0]).tensors
    lora = read(path)
    assert lora.keys["general.type"][1] == "adapter" and lora.keys["adapter.type"][1] == "lora"
    factors = {key: np.frombuffer(data, np.float32).reshape(shape) for key, (_, shape, data) in lora.tensors.items()}
    changed = [key for key in after if after[key] != before[key] and key in before]
    assert set(factors) == {f"{key}.lora_{which}" for key in changed for which in "ab"}
    for key in changed:
        a, b = factors[f"{key}.lora_a"], factors[f"{key}.lora_b"]
        delta = a @ b.T if key == "token_embd.weight" else b @ a
        delta = delta * (lora.keys["adapter.lora.alpha"][1] / b.shape[-1])
        old, new = (np.frombuffer(tensors[key][2], np.float32).reshape(tensors[key][1]) for tensors in (before, after))
        assert np.allclose(old + delta, new, atol=2e-6), key


@pytest.mark.parametrize("name", CASES)
def test_lora_is_folded_into_a_gguf_file(
    adapters: dict[str, tuple[Path, Path, Path]], name: str, tmp_path: Path
) -> None:
    """The F32 file of the base with the adapter folded in, as PEFT's folder and as GGUF: PEFT's merged model."""
    base, adapter, merged = adapters[name]
    (source,) = mergeforge.convert_to_gguf(base, "f32", out=tmp_path / "base.gguf", device="cpu")
    (lora,) = mergeforge.convert_to_gguf(adapter, base=base, out=tmp_path / "lora.gguf")
    (wanted,) = mergeforge.convert_to_gguf(merged, "f32", out=tmp_path / "merged.gguf", device="cpu")
    common = {"types": "f32", "device": "cpu", "memory": "64MiB"}
    (ours,) = mergeforge.convert_to_gguf(source, adapters={lora: 1.0}, out=tmp_path / "ours.gguf", **common)
    (same,) = mergeforge.convert_to_gguf(source, adapters={adapter: 1.0}, base=base, out=tmp_path / "b.gguf", **common)
    expected, folded, from_folder = (read(path).tensors for path in (wanted, ours, same))
    assert set(folded) <= set(expected)
    for key, (kind, shape, data) in folded.items():
        assert (kind, shape) == expected[key][:2]
        value, theirs, other = (
            np.frombuffer(tensor, np.float32) for tensor in (data, expected[key][2], from_folder[key][2])
        )
        assert np.allclose(value, theirs, atol=2e-6), key
        assert np.allclose(value, other, atol=2e-6), key


def test_fold_is_streamed_to_a_quantized_file(adapters: dict[str, tuple[Path, Path, Path]], tmp_path: Path) -> None:
    """Half of the adapter into F32, then quantized; against the two in one step."""
    base, adapter, _ = adapters["llama"]
    (source,) = mergeforge.convert_to_gguf(base, "f32", out=tmp_path / "base.gguf", device="cpu")
    (lora,) = mergeforge.convert_to_gguf(adapter, base=base, out=tmp_path / "lora.gguf")
    command = ["gguf", str(source), "--adapter", f"{lora}:0.5", "--device", "cpu", "-q"]
    assert run_command([*command, "--type", "f32", "--out", str(tmp_path / "folded.gguf")]) == 0
    assert run_command([*command, "--type", "q4_k_m", "--out", str(tmp_path / "one.gguf"), "-j", "3"]) == 0
    two = ["gguf", str(tmp_path / "folded.gguf"), "--type", "q4_k_m", "--out", str(tmp_path / "two.gguf"), "-q"]
    assert run_command(two) == 0
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_loras_of_other_models_are_refused(adapters: dict[str, tuple[Path, Path, Path]], tmp_path: Path) -> None:
    """A GGUF LoRA of another architecture, of another size, one that is a model; the folder of another base."""
    base, adapter, _ = adapters["llama"]
    (source,) = mergeforge.convert_to_gguf(base, "f32", out=tmp_path / "base.gguf", device="cpu")
    (lora,) = mergeforge.convert_to_gguf(adapter, base=base, out=tmp_path / "lora.gguf")
    (other,) = mergeforge.convert_to_gguf(adapters["falcon"][0], "f32", out=tmp_path / "falcon.gguf", device="cpu")
    (small,) = mergeforge.convert_to_gguf(adapters["mixtral"][0], "f32", out=tmp_path / "mixtral.gguf", device="cpu")
    cases = [(other, lora, None, "architecture llama"), (small, lora, None, "llama|does not have|shapes")]
    cases += [(source, other, None, "not a LoRA adapter"), (other, adapter, base, "adapter's base model|has no")]
    before = sorted(tmp_path.iterdir())
    for file, wrong, named_base, message in cases:
        with pytest.raises(SourceError, match=message) as error:
            mergeforge.convert_to_gguf(
                file, "q8_0", adapters={wrong: 1.0}, base=named_base, out=tmp_path / "x.gguf", device="cpu"
            )
        assert error.value.hint or message.startswith("llama")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0"])
def test_file_equals_the_scripts(adapters: dict[str, tuple[Path, Path, Path]], type_: str, tmp_path: Path) -> None:
    """Byte by byte, except for OTHER_IN_THE_SCRIPT."""
    different = []
    for name, (base, adapter, _) in adapters.items():
        theirs = tmp_path / f"{name}.gguf"
        script = [sys.executable, f"{TREE}/convert_lora_to_gguf.py", str(adapter), "--base", str(base)]
        subprocess.run([*script, "--outfile", str(theirs), "--outtype", type_], check=True, capture_output=True)
        (ours,) = mergeforge.convert_to_gguf(adapter, type_, base=base, out=tmp_path / f"{name}-ours.gguf")
        if ours.read_bytes() != theirs.read_bytes():
            different.append(name)
    assert different == list(OTHER_IN_THE_SCRIPT)


def test_base_is_the_one_that_the_adapter_names(
    adapters: dict[str, tuple[Path, Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = adapters["llama"]
    monkeypatch.chdir(tmp_path)
    (expected,) = mergeforge.convert_to_gguf(adapter, base=base, out=tmp_path / "x.gguf")
    assert run_command(["gguf", str(adapter), "--type", "f32", "--type", "f16", "-q"]) == 0
    written = sorted(path.name for path in Path("llama-adapter-GGUF").iterdir())
    assert written == ["llama-adapter-F16-LoRA.gguf", "llama-adapter-F32-LoRA.gguf"]
    assert Path("llama-adapter-GGUF", written[1]).read_bytes() == expected.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        mergeforge.convert_to_gguf(adapter, base=base, out=tmp_path / "x.gguf")


def test_what_a_gguf_lora_cannot_hold_is_refused(
    adapters: dict[str, tuple[Path, Path, Path]], lab: Any, tmp_path: Path
) -> None:
    """Another base, mixed types, options of models, DoRA, a trained head."""
    base, adapter, _ = adapters["llama"]
    with pytest.raises(SourceError, match="matches no tensor"):
        mergeforge.convert_to_gguf(adapter, base=adapters["gpt2"][0], out=tmp_path / "x.gguf")
    with pytest.raises(RecipeError, match="Q4_K_M"):
        mergeforge.convert_to_gguf(adapter, "q4_k_m", base=base, out=tmp_path / "x.gguf")
    assert run_command(["gguf", str(adapter), "--pure", "--out", str(tmp_path / "x.gguf")]) == 2
    other = lab.base("llama")
    for settings, message in (({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "replaced")):
        with pytest.raises(SourceError, match=message):
            mergeforge.convert_to_gguf(lab.train(other, **settings).folder, base=other, out=tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
