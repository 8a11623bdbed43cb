"""Tiny models made with transformers, and adapters with random weights, saved with PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.quiet import quiet

VOCABULARY = 48
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def logits(model: Any) -> torch.Tensor:
    """The logits of a model for every token of its vocabulary."""
    tokens = torch.arange(model.get_input_embeddings().weight.shape[0]).view(3, -1)
    with torch.no_grad(), quiet():
        return model.eval()(tokens).logits


@dataclass(frozen=True)
class Trained:
    """A saved adapter and the unmerged PeftModel that it was saved from."""

    folder: Path
    model: Any

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")

    def merged_by_peft(self) -> dict[str, torch.Tensor]:
        with quiet():
            return copy.deepcopy(self.model).merge_and_unload().state_dict()


class Lab:
    """Makes base models (each kind once) and adapters for them, in one folder."""

    quiet = staticmethod(quiet)
    logits = staticmethod(logits)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def base(self, kind: str, dtype: str = "float32") -> Path:
        """The folder of a tiny llama, llama-tied, qwen2 or gpt2 model without zero weights."""
        folder = self.folder / f"{kind}-{dtype}"
        if not folder.exists():
            with quiet():
                torch.manual_seed(0)
                model = _model(kind)
                _shake(model.parameters(), seed=1)
                model.to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    def train(self, base: Path, *, grow: int = 0, seed: int = 0, **config: Any) -> Trained:
        """A LoRA adapter with random values in all trainable tensors."""
        import peft
        import transformers

        with quiet():
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            if grow:
                model.resize_token_embeddings(VOCABULARY + grow, mean_resizing=False)
            settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config)
            model = peft.get_peft_model(model, settings)
            _shake((parameter for parameter in model.parameters() if parameter.requires_grad), seed)
            folder = self._next("adapter")
            model.save_pretrained(folder)
        return Trained(folder, model.eval())

    def tune(self, base: Path, name: str, config: dict[str, Any], seed: int = 0) -> Trained:
        """Like train, for any PEFT configuration class."""
        import peft
        import transformers

        with quiet():
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            settings = getattr(peft, name)(**config)
            model = peft.get_peft_model(model, settings)
            _shake((parameter for parameter in model.parameters() if parameter.requires_grad), seed)
            folder = self._next("adapter")
            model.save_pretrained(folder)
        return Trained(folder, model.eval())

    def edited(
        self,
        adapter: Trained,
        config: dict[str, Any] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    ) -> Path:
        """A copy of the adapter with another config or other tensors."""
        folder = self._next("edited")
        folder.mkdir()
        old = json.loads((adapter.folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(old | (config or {})))
        save_file(tensors(adapter.tensors), folder / "adapter_model.safetensors")
        return folder

    def out(self) -> Path:
        return self._next("merged")

    def load(self, folder: Path) -> Any:
        """Load a model with transformers; no key may be missing, unexpected or mismatched."""
        import transformers

        with quiet():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model

    def _next(self, kind: str) -> Path:
        self.count += 1
        return self.folder / f"{kind}-{self.count}"


def _model(kind: str) -> Any:
    import transformers

    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config)
    if kind == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=VOCABULARY, **SIZES, **HEADS))
    tied = {"llama": False, "llama-tied": True}[kind]
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **SIZES, **HEADS)
    return transformers.LlamaForCausalLM(config)


def _shake(parameters: Iterator[torch.nn.Parameter], seed: int) -> None:
    """Add noise, so that nothing is zero (lora_B, biases) and DoRA magnitudes differ from the norms."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))
