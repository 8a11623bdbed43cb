"""Tiny transformers models, and copies with low-rank, full-rank or other changes of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.quiet import quiet

VOCABULARY = 48
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "c_attn",
    "c_proj",
    "c_fc",
    "experts",
)


def make_model(kind: str) -> Any:
    """A tiny llama, llama-tied, qwen2 (with biases), mixtral (with experts) or gpt2 (weights stored in, out)."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config)
    if kind == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=VOCABULARY, **SIZES, **HEADS))
    if kind == "mixtral":
        config = transformers.MixtralConfig(vocab_size=VOCABULARY, num_local_experts=4, **SIZES, **HEADS)
        return transformers.MixtralForCausalLM(config)
    tied = {"llama": False, "llama-tied": True}[kind]
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **SIZES, **HEADS)
    )


def save_pair(folder: Path, kind: str, rank: int, also: tuple[str, ...] = (), only: str = "") -> tuple[Path, Path]:
    """Save (base, tuned). A product of that rank is added to every linear weight whose name contains `only`, and
    random numbers to every tensor whose name contains one of `also`."""
    model, generator = make_model(kind), torch.Generator().manual_seed(rank)
    with quiet():
        model.save_pretrained(folder / "base")
        for name, weight in model.named_parameters():
            if any(part in name for part in also):
                weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
            elif only in name and weight.ndim > 1 and any(part in name for part in LINEAR):
                for matrix in weight.data if weight.ndim == 3 else [weight.data]:  # experts are stacked
                    remaining = torch.randn(matrix.shape[0], rank, generator=generator)
                    matrix.addmm_(remaining, torch.randn(rank, matrix.shape[1], generator=generator), alpha=0.01)
        model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def tensors(folder: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / file)


def load(folder: Path) -> Any:
    import transformers

    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_adapted(base: Path, adapter: Path) -> Any:
    """Load the adapter on its base with PEFT, and check that PEFT loaded all of its tensors."""
    import peft

    with quiet():
        model = peft.PeftModel.from_pretrained(load(base), adapter)
        ours = tensors(adapter, "adapter_model.safetensors")
        theirs = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert all(
            torch.equal(ours[name], value.to(ours[name].dtype)) for name, value in theirs.items() if name in ours
        )
        assert set(ours) >= {name for name in theirs if "lora_" in name}
        assert {name for name in ours if "lora_" in name} == {name for name in theirs if "lora_" in name}
    return model.eval()


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with quiet():
        return load_adapted(base, adapter).merge_and_unload().state_dict()


def logits(model: Any) -> torch.Tensor:
    """The logits of a model for every token of its vocabulary."""
    with torch.no_grad(), quiet():
        return model(torch.arange(VOCABULARY).view(3, -1)).logits
