"""The parts of a model that get an adapter only when a target names them: everything that a text does not run through
(vision and audio towers, projectors, layers that attend to images), and the routers of mixture-of-experts models.

A router that moves makes experts answer for tokens that they were not trained on, and the towers see nothing in text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ALL_LINEAR = (None, "all-linear")  # values of lora.targets that adapt every linear module of the text part
ROUTERS = ("router", "gate", "shared_expert_gate", "shared_experts_gate")
MODALITY_ROUTER = "modality_router"  # of Gemma 3n, which has no experts
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LINEAR_CLASSES = ("Linear", "FalconLinear", "Conv1D", "Linear4bit", "Linear8bitLt")

Targets = str | Sequence[str] | None
Modules = Sequence[tuple[str, Any]]  # path -> module


@dataclass(frozen=True)
class UntargetedPart:
    """`name`: the part of a path that names it, such as vision_tower; `pattern`: matches the paths of its modules."""

    name: str
    pattern: str

    def is_named_by(self, targets: Targets) -> bool:
        """Whether a module name or regular expression in lora.targets contains the name."""
        if targets in ALL_LINEAR or targets is None:
            return False
        texts = [targets] if isinstance(targets, str) else targets
        return any(re.search(rf"(?<!\w){re.escape(self.name)}(?!\w)", text) for text in texts)


def untargeted_pattern(parts: Iterable[UntargetedPart], targets: Targets) -> str:
    """A regular expression for the modules that `targets` does not mean, whatever it matches; "" for none."""
    return "|".join(part.pattern for part in parts if not part.is_named_by(targets))


def untargeted_parts(model: Any) -> tuple[UntargetedPart, ...]:
    """The parts of a transformers model that no target means unless it names them."""
    towers = [UntargetedPart(path.rpartition(".")[2], rf"{re.escape(path)}(\..*)?") for path in _towers(model)]
    outside = untargeted_pattern(towers, None)
    towers += _layers_for_images(model)
    text = [(name, module) for name, module in model.named_modules() if not re.fullmatch(outside, name)]
    names = sorted(_routers(model, text) | _linear_subclasses(text))
    return (*towers, *(UntargetedPart(name, rf"(.*\.)?{re.escape(name)}(\..*)?") for name in names))


def linear_names(model: Any) -> list[str]:
    """The paths of all linear modules but the head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if is_linear(module) and module is not head]


def is_linear(module: Any) -> bool:
    return type(module).__name__ in LINEAR_CLASSES


def _towers(model: Any) -> list[str]:
    """The paths of the modules beside the text model, where config.json has a part for the text."""
    if model.config.get_text_config() is model.config:
        return []
    linears = linear_names(model)
    embedding = model.get_input_embeddings()
    text = next(name for name, module in model.named_modules() if module is embedding).split(".")[:-1]
    while text and not any(name.startswith(".".join(text) + ".") for name in linears):
        text.pop()
    return list(dict.fromkeys(path for name in linears if (path := _beside(name.split("."), text))))


def _layers_for_images(model: Any) -> list[UntargetedPart]:
    """The layers of Mllama that attend to images: for a text they are left out."""
    numbers = getattr(model.config.get_text_config(), "cross_attention_layers", None)
    pattern = rf".*\.layers\.({'|'.join(map(str, numbers))})(\..*)?" if numbers else ""
    return [UntargetedPart("cross_attn", pattern)] if numbers else []


def _beside(path: list[str], text: list[str]) -> str:
    """The part of a module's path up to where it leaves the text model's; "" inside of the text model."""
    shared = next((index for index, (a, b) in enumerate(zip(path, text, strict=False)) if a != b), len(text))
    return "" if shared == len(text) else ".".join(path[: shared + 1])


def _routers(model: Any, modules: Modules) -> set[str]:
    """The names of the linear modules that choose experts or weigh a shared one, and of Gemma 3n's router."""
    config = model.config.get_text_config()
    has_experts = any((getattr(config, key, None) or 0) for key in EXPERT_COUNTS)
    routers = (MODALITY_ROUTER, *(ROUTERS if has_experts else ()))
    return {part for name, module in modules if is_linear(module) for part in name.split(".") if part in routers}


def _linear_subclasses(modules: Modules) -> set[str]:
    """Last names of modules that inherit from nn.Linear but do something else (PhiMoE's router returns a tuple)."""
    from torch import nn

    return {
        name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear) and not is_linear(module)
    }
