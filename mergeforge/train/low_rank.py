"""Optimizers for full training whose state has a low rank: GaLore (arXiv 2403.03507) and APOLLO (arXiv 2412.05270).

They project the gradients of linear modules to `rank` dimensions, so Adam's state is small. Each is a package of its
own; transformers gives it the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.errors import did_you_mean
from mergeforge.recipe.schema import Integer, Number, ReportProblem, Schema
from mergeforge.recipe.yaml_reader import Path

RANK = 128  # transformers' default
OPTION_SCHEMAS: dict[str, Schema] = {"rank": Integer(1), "update_proj_gap": Integer(1), "scale": Number(0)}


@dataclass(frozen=True)
class LowRankOptimizer:
    """An optimizer's Python module, its package, the options that it takes, and the classes in its state."""

    module: str
    package: str
    options: tuple[str, ...]
    state_classes: tuple[str, ...]


LOW_RANK_OPTIMIZERS = {  # under transformers' names
    "galore_adamw": LowRankOptimizer(
        "galore_torch",
        "galore-torch",
        ("rank", "update_proj_gap", "scale", "proj_type"),
        ("galore_torch.galore_projector.GaLoreProjector",),
    ),
    "apollo_adamw": LowRankOptimizer(
        "apollo_torch",
        "apollo-torch",
        ("rank", "update_proj_gap", "scale", "proj_type", "proj", "scale_type"),
        ("apollo_torch.random_projector.GradientProjector", "apollo_torch.svd_projector.GaLoreProjector"),
    ),
}


@dataclass(frozen=True)
class OptimizerOptions:
    """Schema of `optimizer_options`: a mapping, or transformers' text "rank=64, scale=0.25"."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, str):
            pairs = [pair.partition("=") for pair in value.replace(" ", "").split(",") if pair]
            value = {name: _number(text) for name, _, text in pairs}
        if not isinstance(value, Mapping) or any(not isinstance(item, int | float | str) for item in value.values()):
            report(path, f"'{path[-1]}' must be a mapping of numbers and texts, not {value!r}", "write {rank: 128}")
            return {}
        return dict(value)

    def json_schema(self) -> dict[str, Any]:
        values = {"additionalProperties": {"type": ["number", "string"]}}
        return {"type": ["object", "string"], **values, "description": self.description}


def check_low_rank(values: Mapping[str, Any], report: ReportProblem) -> None:
    """Report what does not go with the optimizer in the checked values of train.yaml."""
    name, options = values.get("optimizer") or "adamw", values.get("optimizer_options") or {}
    optimizer = LOW_RANK_OPTIMIZERS.get(name)
    if optimizer is None:
        if options:
            hint = f"it is for optimizer: {' and '.join(LOW_RANK_OPTIMIZERS)}"
            report(("optimizer_options",), f"optimizer: {name} takes no options", hint)
        return
    if values.get("method", "qlora") != "full":
        text = f"{name} saves memory where whole weights are trained; the state of an adapter is small"
        report(("optimizer",), text, "set method: full, or optimizer: adamw")
    for option in options:
        if option not in optimizer.options:
            hint = did_you_mean(option, optimizer.options) or f"it has {', '.join(optimizer.options)}"
            report(("optimizer_options", option), f"{name} has no option '{option}'", hint)
        elif option in OPTION_SCHEMAS:
            OPTION_SCHEMAS[option].read(options[option], ("optimizer_options", option), report)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
