"""ModelStats: the sizes that memory and time depend on, counted on the model's own modules without its weights.

The model is built from its config.json on torch's meta device, so this works for every architecture that transformers
has, and downloads no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.errors import SourceError
from mergeforge.train.settings import LoraOptions

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = (None, "all-linear")  # values of lora.targets that adapt every linear module


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
    """Sizes in elements.

    `linears`: the modules that 4 bit quantizes and all-linear adapts; `other_parameters`: norms, biases, experts.
    `expert_stacks`: for each parameter that holds all experts of a layer, (experts, inputs + outputs, where a fused
    gate and up counts twice); all-linear adapts these too. `not_adapted`: last names of modules that get no adapter by
    default.
    """

    linears: tuple[LinearModule, ...]
    embedding: int
    head: int  # 0 where it is the embedding
    other_parameters: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    max_positions: int
    expert_stacks: tuple[tuple[int, int], ...] = ()
    not_adapted: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        return sum(module.numel for module in self.linears) + self.embedding + self.head + self.other_parameters

    def adapted(self, lora: LoraOptions) -> list[LinearModule]:
        """The linear modules that get an adapter."""
        targets = lora.targets
        if targets is None:
            return [module for module in self.linears if module.name.rpartition(".")[2] not in self.not_adapted]
        if targets == "all-linear":
            return list(self.linears)
        if isinstance(targets, str):
            return [module for module in self.linears if re.fullmatch(targets, module.name)]
        return [module for module in self.linears if any(_is_named(module, name) for name in targets)]

    def adapter_parameters(self, lora: LoraOptions) -> int:
        """Elements of A and B (and of DoRA's magnitudes)."""
        rank = lora.r or 16
        experts = sum(count * rank * size for count, size in self.expert_stacks) if lora.targets in ALL_LINEAR else 0
        return experts + sum(
            rank * (module.in_features + module.out_features) + (module.out_features if lora.dora else 0)
            for module in self.adapted(lora)
        )


def _is_named(module: LinearModule, name: str) -> bool:
    """Whether PEFT counts the module as a target of that name."""
    return module.name == name or module.name.endswith(f".{name}")


def model_stats(folder: str) -> ModelStats:
    """The stats of a folder with a config.json. Raises SourceError where transformers cannot build the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"{folder} is not a causal language model: {str(error).splitlines()[0]}") from None
    return _stats(model, config.get_text_config())


def _stats(model: Any, config: Any) -> ModelStats:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears = tuple(
        _linear(name, module) for name, module in model.named_modules() if _is_linear(module) and module is not head
    )
    tied = head is None or getattr(config, "tie_word_embeddings", False)
    head_numel = 0 if tied else head.weight.numel()
    numel = sum(parameter.numel() for parameter in model.parameters())
    if tied and head is not None and head.weight is not embedding.weight:
        numel -= head.weight.numel()
    others = numel - sum(module.numel for module in linears) - embedding.weight.numel() - head_numel
    hidden = int(getattr(config, "hidden_size", embedding.weight.shape[1]))
    return ModelStats(
        linears=linears,
        embedding=embedding.weight.numel(),
        head=head_numel,
        other_parameters=max(others, 0),
        vocabulary=embedding.weight.shape[0],
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        layers=int(getattr(config, "num_hidden_layers", 0)),
        max_positions=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        not_adapted=frozenset(modules_without_adapter(config.model_type)),
        expert_stacks=tuple(
            (parameter.shape[0], _rank_factor(name) * sum(parameter.shape[1:]))
            for name, parameter in model.named_parameters()
            if parameter.dim() == 3 and "expert" in name
        ),
    )


def modules_without_adapter(model_type: str) -> set[str]:
    """Last names of linear modules that cannot have an adapter.

    Mamba's kernels read the weight of out_proj themselves, without calling the module, and PEFT refuses it.
    """
    return {"out_proj"} if "mamba" in model_type else set()


def _rank_factor(name: str) -> int:
    """PEFT doubles the rank for gate and up fused into one parameter."""
    return 2 if name.endswith("gate_up_proj") else 1


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _linear(name: str, module: Any) -> LinearModule:
    """A Linear's weight is (outputs, inputs), a Conv1D's (inputs, outputs)."""
    rows, columns = module.weight.shape
    return LinearModule(name, columns, rows) if type(module).__name__ == "Linear" else LinearModule(name, rows, columns)
