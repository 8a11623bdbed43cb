"""Adapters and bases named by different versions of transformers, compared with PEFT's merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.other_names import dump, other_names
from support.quiet import quiet
from support.tiny_architectures import ARCHITECTURES, Architecture

import mergeforge

KINDS = ("llama", "gpt_neox", "bloom", "falcon", "mixtral", "bert", "roberta", "t5", "vit", "clip", "siglip", "llava")
KINDS += ("gemma3", "qwen2_5_vl", "phimoe", "phi3")
QUICK = ("bert", "llava", "gemma3", "qwen2_5_vl", "phimoe")
CASES = [
    pytest.param(one, id=one.kind, marks=[] if one.kind in QUICK else [pytest.mark.slow])
    for one in ARCHITECTURES
    if one.kind in KINDS
]


@pytest.mark.parametrize("case", CASES)
def test_adapters_and_bases_with_other_names(case: Architecture, tmp_path: Path) -> None:
    """An adapter in the Hub's, the class's and prefix-less names, onto a base in each of them."""
    import peft

    model = case.make(1)
    with quiet():
        model.save_pretrained(tmp_path / "hub")
    for how in ("memory", "bare"):
        dump(model, other_names(model, how), tmp_path / how)
    hub_names = _hub_names(model, load_file(tmp_path / "hub" / "model.safetensors"))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(hub_names), init_lora_weights=False)
    with quiet():
        adapter = peft.get_peft_model(model, config)
        adapter.save_pretrained(tmp_path / "adapter")
        expected = adapter.merge_and_unload().state_dict()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {
        "memory": {name: name for name in hub_names},
        "hub": hub_names,
        "bare": {name: name.removeprefix(f"{model.base_model_prefix}.") for name in hub_names},
    }
    for keys in names.values():
        renamed = {_renamed(key, keys): value for key, value in saved.items()}
        save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
        for base in ("hub", "memory", "bare"):
            out = tmp_path / "out"
            options = {"base_model": str(tmp_path / base), "adapters": [str(tmp_path / "adapter")], "overwrite": True}
            loaded, report = case.load(mergeforge.merge(out=out, device="cpu", threads=1, **options))
            assert not any(report.values())
            for name, value in loaded.state_dict().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=f"{base}: {name}")


def _hub_names(model: torch.nn.Module, stored: dict[str, torch.Tensor]) -> dict[str, str]:
    """Path of a linear layer in memory -> its path in the saved file, found by its values."""
    names = {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in path and path.split(".")[-1] != "decoder":
            same = [name for name, value in stored.items() if value.equal(layer.weight)]
            names |= {path: same[0].removesuffix(".weight")} if same else {}
    return names


def _renamed(key: str, paths: dict[str, str]) -> str:
    path, _, leaf = key.removeprefix("base_model.model.").rpartition(".lora_")
    return f"base_model.model.{paths[path]}.lora_{leaf}"
