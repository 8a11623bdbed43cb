"""llama.cpp's LoRA of an embedding, compared with the PEFT adapter that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mergeforge

if TYPE_CHECKING:
    from support.peft_lab import Lab, Trained


def as_gguf(adapter: Trained, path: Path) -> Path:
    """The file that convert_lora_to_gguf.py writes: lora_a of the embedding is transposed, lora_b is not."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8)
    for name, value in adapter.tensors.items():
        if "lora_embedding_" in name:
            value = value.t() if name.endswith("A") else value
            writer.add_tensor(f"token_embd.weight.lora_{name[-1].lower()}", np.ascontiguousarray(value.numpy()))
        elif ".v_proj." in name:  # the rows of q and k would be permuted
            layer, which = name.split(".")[4], name.split(".lora_")[1][0].lower()
            writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_{which}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_embedding_lora_of_llama_cpp(lab: Lab, kind: str, tmp_path: Path) -> None:
    """The fold has the bytes of the PEFT adapter's fold; a tied head keeps its values, as in PEFT."""
    base = lab.base(kind)
    adapter = lab.train(base, target_modules=["embed_tokens", "v_proj"])
    path = as_gguf(adapter, tmp_path / "lora.gguf")
    outs = []
    for name, source in (("peft", adapter.folder), ("gguf", path)):
        options = {"base_model": str(base), "adapters": [str(source)], "out": tmp_path / name, "device": "cpu"}
        outs.append(load_file(mergeforge.merge(**options) / "model.safetensors"))
    assert outs[0].keys() == outs[1].keys()
    assert all(outs[1][name].equal(value) for name, value in outs[0].items())
    assert not outs[0]["model.embed_tokens.weight"].equal(
        load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    )


def test_combined_with_a_peft_adapter(lab: Lab, tmp_path: Path) -> None:
    """The sum of both as one PEFT adapter, folded, is the sum of their changes."""
    base = lab.base("llama")
    adapters = [lab.train(base, seed=seed, target_modules=["embed_tokens", "v_proj"]) for seed in (1, 2)]
    path = as_gguf(adapters[1], tmp_path / "lora.gguf")
    recipe = {"base_model": str(base), "adapters": [str(path), str(adapters[0].folder)]}
    out = mergeforge.merge({**recipe, "output": {"adapter": True}}, out=tmp_path / "both", device="cpu")
    folded = load_file(mergeforge.merge(recipe, out=tmp_path / "folded", device="cpu") / "model.safetensors")
    again = {"base_model": str(base), "adapters": [str(out / "adapter" if (out / "adapter").exists() else out)]}
    combined = load_file(mergeforge.merge(again, out=tmp_path / "again", device="cpu") / "model.safetensors")
    for name, value in folded.items():
        torch.testing.assert_close(combined[name], value, rtol=1e-5, atol=1e-6, msg=name)
