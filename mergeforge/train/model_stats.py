"""ModelStats: the sizes that memory and time depend on, counted on the model's own modules without its weights.

The model is built from its config.json on torch's meta device, so this works for every architecture that transformers
has, and downloads no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mergeforge.checkpoints.rope import FULL_ATTENTION
from mergeforge.errors import SourceError
from mergeforge.eval.model_class import language_model_class
from mergeforge.train.fused_experts import expert_names
from mergeforge.train.settings import LoraOptions
from mergeforge.train.untargeted import (
    ALL_LINEAR,
    UntargetedPart,
    linear_names,
    untargeted_parts,
    untargeted_pattern,
)

# Mamba 2 beside attention, whose output is o_proj
MAMBA_HYBRIDS = ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")


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
    gate and up counts twice); all-linear adapts these too if PEFT can (`adapts_experts`). `untargeted`: the parts that
    get an adapter only when lora.targets names them; `not_adapted`: last names of modules that cannot have one.
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
    rope: str = ""  # transformers' type of the rotary positions; "": it has none that can be scaled
    expert_stacks: tuple[tuple[int, int], ...] = ()
    adapts_experts: bool = False
    not_adapted: frozenset[str] = frozenset()
    untargeted: tuple[UntargetedPart, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(module.numel for module in self.linears) + self.embedding + self.head + self.other_parameters

    def adapted(self, lora: LoraOptions) -> list[LinearModule]:
        """The linear modules that get an adapter."""
        untargeted = untargeted_pattern(self.untargeted, lora.targets)
        return [module for module in self._matching(lora) if not re.fullmatch(untargeted, module.name)]

    def _matching(self, lora: LoraOptions) -> list[LinearModule]:
        """The linear modules that lora.targets matches."""
        targets = lora.targets
        if targets in ALL_LINEAR or targets is None:
            return [module for module in self.linears if module.name.rpartition(".")[2] not in self.not_adapted]
        if isinstance(targets, str):
            return [module for module in self.linears if re.fullmatch(targets, module.name)]
        return [module for module in self.linears if any(_is_named(module, name) for name in targets)]

    def adapter_parameters(self, lora: LoraOptions) -> int:
        """Elements of A and B (and of DoRA's magnitudes)."""
        rank = lora.r or 16
        is_adapted = self.adapts_experts and lora.targets in ALL_LINEAR
        experts = sum(count * rank * size for count, size in self.expert_stacks) if is_adapted else 0
        return experts + sum(
            rank * (module.in_features + module.out_features) + (module.out_features if lora.dora else 0)
            for module in self.adapted(lora)
        )


def _is_named(module: LinearModule, name: str) -> bool:
    """Whether PEFT counts the module as a target of that name."""
    return module.name == name or module.name.endswith(f".{name}")


def model_stats(folder: str) -> ModelStats:
    """The stats of a folder with a config.json. Raises SourceError where transformers cannot build the model."""
    return stats_of(empty_model(folder))


def empty_model(folder: str, attention: str | None = None) -> Any:
    """The model of a folder with a config.json, on torch's meta device: modules and shapes without weights.

    Raises SourceError where transformers cannot build the model.
    """
    import torch

    try:
        model_class, config = language_model_class(folder)
        options = {"attn_implementation": attention} if attention else {}
        with torch.device("meta"):
            return model_class.from_config(config, dtype=torch.bfloat16, **options)
    except ImportError as error:  # a package that the model's vision tower needs: the message spreads over lines
        raise SourceError(f"transformers cannot build the model of {folder}: {' '.join(str(error).split())}") from None
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SourceError(f"transformers cannot build the model of {folder}: {reason}") from None


def stats_of(model: Any) -> ModelStats:
    """The stats of a model on any device."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules())
    linears = tuple(_linear(name, modules[name]) for name in linear_names(model))
    # a vision-language model's own flag counts, not that of its text part
    tied = head is None or head.weight is embedding.weight or getattr(model.config, "tie_word_embeddings", False)
    head_numel = 0 if tied else head.weight.numel()
    numel = sum(parameter.numel() for parameter in model.parameters())
    if tied and head is not None and head.weight is not embedding.weight:
        numel -= head.weight.numel()
    others = numel - sum(module.numel for module in linears) - embedding.weight.numel() - head_numel
    hidden = int(getattr(config, "hidden_size", embedding.weight.shape[1]))
    expert_stacks = _expert_stacks(model)
    return ModelStats(
        linears=linears,
        embedding=embedding.weight.numel(),
        head=head_numel,
        other_parameters=max(others, 0),
        vocabulary=embedding.weight.shape[0],
        hidden=hidden,
        intermediate=_largest(getattr(config, "intermediate_size", None)) or 4 * hidden,
        layers=int(getattr(config, "num_hidden_layers", 0)),
        max_positions=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        rope=_rope_type(config),
        not_adapted=frozenset(modules_without_adapter(config.model_type)),
        untargeted=untargeted_parts(model),
        expert_stacks=expert_stacks,
        adapts_experts=bool(expert_stacks and expert_names(model)),
    )


def _expert_stacks(model: Any) -> tuple[tuple[int, int], ...]:
    return tuple(
        (parameter.shape[0], _rank_factor(name) * sum(parameter.shape[1:]))
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name
    )


def _rope_type(config: Any) -> str:
    """The type of the rotary positions of layers with full attention; "" for those of images."""
    parameters = getattr(config, "rope_parameters", None) or {}
    full = parameters.get(FULL_ATTENTION, parameters)
    is_flat = isinstance(full, dict) and not any(isinstance(value, dict) for value in full.values())
    return str(full.get("rope_type", "")) if is_flat and "mrope_section" not in full else ""


def _largest(size: Any) -> int:
    """A size of config.json, which Gemma 3n gives for each layer."""
    return int(max(size) if isinstance(size, list | tuple) else size or 0)


def modules_without_adapter(model_type: str) -> set[str]:
    """Last names of linear modules that cannot have an adapter.

    Mamba reads the weights of dt_proj and, in its kernels, of out_proj without calling the modules; PEFT refuses the
    latter in some of these models. Gemma 3n reads the weight of correction_coefs.
    """
    if model_type == "gemma3n_text":
        return {"correction_coefs"}
    if model_type == "jamba":
        return {"dt_proj"}
    if model_type in MAMBA_HYBRIDS:
        return {"out_proj"}
    return {"out_proj", "dt_proj"} if "mamba" in model_type else set()


def _rank_factor(name: str) -> int:
    """PEFT doubles the rank for gate and up fused into one parameter."""
    return 2 if name.endswith("gate_up_proj") else 1


def _linear(name: str, module: Any) -> LinearModule:
    """A Linear's weight is (outputs, inputs), a Conv1D's (inputs, outputs)."""
    rows, columns = module.weight.shape
    return LinearModule(name, rows, columns) if type(module).__name__ == "Conv1D" else LinearModule(name, columns, rows)
