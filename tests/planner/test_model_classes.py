"""Adapters on tiny models of many classes: what transformers loads from the result, against the PeftModel.

The logits right after loading are those of the unmerged PeftModel; nothing is missing and nothing unexpected. By
default for a few classes; for all of them with `-m slow`. test_any_architecture.py merges two models of each class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.more_architectures import MORE
from support.quiet import quiet
from support.tiny_architectures import ARCHITECTURES, VOCABULARY, Architecture

import mergeforge

OPERATIONS = ("fold", "saved head", "saved embedding", "embedding factors", "grown vocabulary")
QUICK = ("llama", "gpt2", "bert", "roberta", "distilbert", "bart", "t5", "whisper", "florence2", "gemma3", "vit")
# PEFT cannot train or run these: nothing to compare with.
WITHOUT_PEFT = {
    "resnet": "no linear layers",
    "deepseek_v2": "PEFT 0.21 refuses up_proj without gate_proj",
    "deepseek_v3": "PEFT 0.21 refuses up_proj without gate_proj",
    "mamba": "PEFT refuses out_proj of Mamba",
    "falcon_mamba": "PEFT refuses out_proj of Mamba",
    "mamba2": "PEFT refuses out_proj of Mamba",
    "phimoe": "PEFT fails in the router",
    "qwen3_next": "PEFT 0.21 refuses gate_proj without up_proj",
    "wav2vec2": "no input embedding; PEFT asks for it",
}
CASES = [
    pytest.param(case, operation, id=f"{case.kind}-{case.auto[9:] or 'Model'}-{operation}",
                 marks=[] if case.kind in QUICK and case.auto != "AutoModel" else [pytest.mark.slow])
    for case in [*ARCHITECTURES, *MORE]
    for operation in OPERATIONS
]  # fmt: skip


@pytest.mark.parametrize("case, operation", CASES)
def test_the_result_loads_as_the_unmerged_model(case: Architecture, operation: str, tmp_path: Path) -> None:
    with quiet():
        case.make(1).save_pretrained(tmp_path / "base")
    model, _ = case.load(tmp_path / "base")
    settings = lora_settings(model, operation)
    if settings is None:
        pytest.skip(f"a {type(model).__name__} has no part for that")
    if operation == "fold" and case.kind in WITHOUT_PEFT:
        pytest.skip(WITHOUT_PEFT[case.kind])
    if operation == "grown vocabulary":
        with quiet():
            model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    expected = train(model, settings, tmp_path / "adapter", case, save_all=operation == "grown vocabulary")
    out = mergeforge.merge(
        base_model=str(tmp_path / "base"),
        adapters=[str(tmp_path / "adapter")],
        out=tmp_path / "out",
        device="cpu",
        threads=1,
    )
    loaded, report = case.load(out)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    torch.testing.assert_close(case.outputs(loaded), expected, rtol=1e-4, atol=1e-4)


def lora_settings(model: Any, operation: str) -> dict[str, Any] | None:
    """The target_modules and modules_to_save of an adapter; None if the class has no such part."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    if not linear:
        return None
    embedding = _name_of(model, _input_embedding(model))
    classifier = next((name for name in linear if name.rpartition(".")[2] in ("classifier", "score")), "")
    saved_head = _name_of(model, head) or classifier
    some = [name for name in linear if name != classifier][:1]
    return {
        "fold": {"target_modules": linear[:4] + linear[-2:]},
        "saved head": {"target_modules": some, "modules_to_save": [saved_head]} if saved_head else None,
        "saved embedding": {"target_modules": some, "modules_to_save": [embedding]} if embedding else None,
        "embedding factors": {"target_modules": [*some, embedding]} if embedding else None,
        "grown vocabulary": {"target_modules": some} if embedding else None,
    }[operation]


def train(model: Any, settings: dict[str, Any], folder: Path, case: Architecture, *, save_all: bool) -> torch.Tensor:
    """Save an adapter with random values in all trainable tensors; the outputs of its PeftModel."""
    import peft

    with quiet():
        lora = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
        trained = peft.get_peft_model(model, lora).eval()
        generator = torch.Generator().manual_seed(3)
        for weight in trained.parameters():
            if weight.requires_grad:
                weight.data.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype), alpha=0.1)
        trained.save_pretrained(folder, **({"save_embedding_layers": True} if save_all else {}))
    return case.outputs(trained.base_model.model)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _input_embedding(model: Any) -> Any:
    try:
        module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return module if isinstance(module, torch.nn.Embedding) else None


def _name_of(model: Any, module: Any) -> str:
    return next((name for name, one in model.named_modules() if one is module), "") if module is not None else ""
