"""The files next to a combined adapter's weights: its config, joining.json and the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.checkpoints.ties import tied_head
from mergeforge.hub.model_card import is_repo_id, write_card
from mergeforge.lora.combine.plan import Combination
from mergeforge.writers.peft_adapter import ADAPTER_CONFIG
from mergeforge.writers.peft_config import lora_config, task_type

REPORT = "joining.json"


@dataclass(frozen=True)
class CombinedModule:
    """A module of the new adapter; `error`: |sum - BA| / |sum| of the truncation (Frobenius norms)."""

    module: str
    rank: int
    summed_rank: int
    error: float
    norm: float | None = None


def adapter_config(plan: Combination, modules: Sequence[CombinedModule]) -> dict[str, Any]:
    configs = _configs(plan)
    return lora_config(
        {item.module: item.rank for item in modules},
        _tensor_names(plan),
        _base(plan),
        task=_common_value(configs, "task_type") or task_type(plan.base.config),
        revision=_common_value(configs, "revision"),
        fan_in_fan_out=any(item.transposed and not item.embedding for item in plan.sums),
    )


def _configs(plan: Combination) -> list[dict[str, Any]]:
    paths = [item.folder / ADAPTER_CONFIG for item in plan.adapters]
    return [read_json(path) for path in paths if path.is_file()]


def _base(plan: Combination) -> str:
    """The base model as the adapters name it, or as the recipe does if they differ."""
    return _common_value(_configs(plan), "base_model_name_or_path") or plan.base.label.partition("@")[0]


def _common_value(configs: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """The value that all the adapters' configs have in common; None if they differ."""
    values = {config.get(name) for config in configs}
    value = values.pop() if len(values) == 1 else None
    return value if isinstance(value, str) else None


def _tensor_names(plan: Combination) -> list[str]:
    """The names of the model's tensors in the adapters, whose prefix may differ from the base's."""
    adapter_names = {name.tensor: f"{name.module}.weight" for name in plan.sums}
    tensor, name = next(iter(adapter_names.items()))
    longer = name.removesuffix(tensor) if name.endswith(tensor) else ""
    shorter = tensor.removesuffix(name) if tensor.endswith(name) else ""
    tied = tied_head(plan.base)
    names = [*plan.base.tensors, *([tied[0]] if tied else [])]
    return [adapter_names.get(name) or longer + name.removeprefix(shorter) for name in names]


def report_json(plan: Combination, modules: Sequence[CombinedModule]) -> bytes:
    total = sum((module.norm or 0.0) ** 2 for module in modules)
    lost = sum((module.error * (module.norm or 0.0)) ** 2 for module in modules)
    value = {
        "format": 1,
        "mergeforge": version("mergeforge"),
        "adapters": [{"name": module.label, "revision": module.revision} for module in plan.adapters],
        "options": {"rank": plan.rank, "energy": plan.energy, "dtype": plan.dtype},
        "error": math.sqrt(lost / total) if total else 0.0,
        "modules": {
            module.module: {
                "rank": module.rank,
                "summed_rank": module.summed_rank,
                "error": module.error,
                "norm": module.norm,
            }
            for module in modules
        },
    }
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def adapter_card(plan: Combination, modules: Sequence[CombinedModule]) -> str:
    names = [Path(item.label).name if Path(item.label).is_absolute() else item.label for item in plan.adapters]
    adapters = "\n".join(f"- {name}" for name in names)
    if plan.exact:
        how = "summed exactly"
    else:
        how = f"truncated to rank {max(module.rank for module in modules)} (errors in `{REPORT}`)"
    front: dict[str, Any] = {"library_name": "peft", "tags": ["mergeforge", "lora", "merge"]}
    base = _base(plan)
    if is_repo_id(base):
        front = {"base_model": base, "base_model_relation": "adapter"} | front
    body = f"{len(modules)} modules, {how}, made with mergeforge from\n\n{adapters}\n"
    return write_card(front, "A sum of adapters", body)
