"""ModelFacts: what memory and time depend on, counted on the model's own modules without any weight.

The model is built on torch's meta device from its config.json alone, so this holds for every architecture and
needs no download of weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.errors import SourceError
from mergeforge.train.settings import LoraOptions

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LinearModule:
    """A linear module: its path, inputs and outputs."""

    name: str
    in_features: int
    out_features: int

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelStats:
    """Sizes in elements. `linears`: what 4 bit quantises and all-linear adapts; `others`: norms, biases, experts.

    `stacks`: the parameters that hold all experts of a layer, (experts, in and out); all-linear adapts these too.
    `left`: last names of modules that get no adapter by themselves.
    """

    linears: tuple[LinearModule, ...]
    embedding: int
    head: int  # 0 where it is the embedding
    other_parameters: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    longest: int  # tokens that positions are known for
    stacks: tuple[tuple[int, int], ...] = ()
    left_alone: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        return sum(one.numel for one in self.linears) + self.embedding + self.head + self.other_parameters

    def adapted(self, lora: LoraOptions) -> list[LinearModule]:
        """The linear modules that get an adapter."""
        targets = lora.targets
        if targets is None or targets == "all-linear":
            left = self.left_alone if targets is None else ()
            return [one for one in self.linears if one.name.rpartition(".")[2] not in left]
        if isinstance(targets, str):
            return [one for one in self.linears if re.fullmatch(targets, one.name)]
        return [
            one for one in self.linears if any(one.name == name or one.name.endswith(f".{name}") for name in targets)
        ]

    def adapter_parameters(self, lora: LoraOptions) -> int:
        """Elements of A, B (and DoRA's magnitudes)."""
        rank = lora.r or 16
        experts = (
            sum(count * rank * sizes for count, sizes in self.stacks) if lora.targets in (None, "all-linear") else 0
        )
        return experts + sum(
            rank * (one.in_features + one.out_features) + (one.out_features if lora.dora else 0)
            for one in self.adapted(lora)
        )


def model_stats(folder: str) -> ModelStats:
    """The facts of a folder that holds a config.json. Raises SourceError where transformers does not know the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"{folder} is no causal language model: {str(error).splitlines()[0]}") from None
    return _stats(model, config.get_text_config())


def _stats(model: Any, config: Any) -> ModelStats:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears = tuple(_linear(name, one) for name, one in model.named_modules() if _is_linear(one) and one is not head)
    tied = head is None or getattr(config, "tie_word_embeddings", False)
    heads = 0 if tied else head.weight.numel()
    everything = sum(one.numel() for one in model.parameters()) - (
        head.weight.numel() if tied and head is not None and head.weight is not embedding.weight else 0
    )
    rest = everything - sum(one.numel for one in linears) - embedding.weight.numel() - heads
    layers = int(getattr(config, "num_hidden_layers", 0))
    hidden = int(getattr(config, "hidden_size", embedding.weight.shape[1]))
    return ModelStats(
        linears=linears,
        embedding=embedding.weight.numel(),
        head=heads,
        other_parameters=max(rest, 0),
        vocabulary=embedding.weight.shape[0],
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        layers=layers,
        longest=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        left_alone=frozenset(left_alone(config.model_type)),
        stacks=tuple(
            (one.shape[0], _ranks(name) * sum(one.shape[1:]))
            for name, one in model.named_parameters()
            if one.dim() == 3 and "expert" in name
        ),
    )


def left_alone(model_type: str) -> set[str]:
    """Linear modules that get no adapter: Mamba's kernels read these weights themselves, past it, and PEFT refuses."""
    return {"out_proj"} if "mamba" in model_type else set()


def _ranks(name: str) -> int:
    """Of what an adapter gives a linear module, as a multiple: gate and up are two in one (PEFT doubles its rank)."""
    return 2 if name.endswith("gate_up_proj") else 1


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _linear(name: str, module: Any) -> LinearModule:
    out, into = module.weight.shape
    return LinearModule(name, into, out) if type(module).__name__ == "Linear" else LinearModule(name, out, into)
