"""What lies beside a joined adapter's weights: its config, joining.json and the card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.checkpoints.names import tied_head
from mergeforge.lora.combine.plan import Join
from mergeforge.writers.peft_adapter import CONFIG
from mergeforge.writers.peft_config import lora_config, task_type

REPORT = "joining.json"


@dataclass(frozen=True)
class Joined:
    """A module of the new adapter; `error`: |sum - BA| / |sum| of the cut, Frobenius."""

    module: str
    rank: int
    summed_rank: int
    error: float
    norm: float | None = None


def adapter_config(plan: Join, found: Sequence[Joined]) -> dict[str, Any]:
    configs = [read_json(one.folder / CONFIG) for one in plan.adapters if (one.folder / CONFIG).is_file()]
    return lora_config(
        {one.module: one.rank for one in found},
        _tensors(plan),
        _agreed(configs, "base_model_name_or_path") or plan.base.label.partition("@")[0],
        task=_agreed(configs, "task_type") or task_type(plan.base.config),
        revision=_agreed(configs, "revision"),
        fan_in_fan_out=any(one.transposed and not one.embedding for one in plan.sums),
    )


def _agreed(configs: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """What all the adapters' configs say, if they say the same."""
    values = {config.get(name) for config in configs}
    value = values.pop() if len(values) == 1 else None
    return value if isinstance(value, str) else None


def _tensors(plan: Join) -> list[str]:
    """The model's tensors as the adapters would name them: perhaps with another prefix than the base's."""
    named = {one.tensor: f"{one.module}.weight" for one in plan.sums}
    tensor, name = next(iter(named.items()))
    longer = name.removesuffix(tensor) if name.endswith(tensor) else ""
    shorter = tensor.removesuffix(name) if tensor.endswith(name) else ""
    tied = tied_head(plan.base)
    names = [*plan.base.tensors, *([tied[0]] if tied else [])]
    return [named.get(one) or longer + one.removeprefix(shorter) for one in names]


def report_json(plan: Join, found: Sequence[Joined]) -> bytes:
    total = sum((one.norm or 0.0) ** 2 for one in found)
    lost = sum((one.error * (one.norm or 0.0)) ** 2 for one in found)
    value = {
        "format": 1,
        "mergeforge": version("mergeforge"),
        "adapters": [{"name": one.label, "revision": one.revision} for one in plan.adapters],
        "options": {"rank": plan.rank, "energy": plan.energy, "dtype": plan.dtype},
        "error": math.sqrt(lost / total) if total else 0.0,
        "modules": {
            one.module: {"rank": one.rank, "summed_rank": one.summed_rank, "error": one.error, "norm": one.norm}
            for one in found
        },
    }
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def adapter_card(plan: Join, found: Sequence[Joined]) -> str:
    names = [Path(one.label).name if Path(one.label).is_absolute() else one.label for one in plan.adapters]
    adapters = "\n".join(f"- {name}" for name in names)
    how = "exactly" if plan.exact else f"cut to rank {max(one.rank for one in found)}; `{REPORT}` has the errors"
    return f"""---
library_name: peft
tags:
- mergeforge
- lora
- merge
---
# A sum of adapters

{len(found)} modules, summed {how}, with [mergeforge](https://pypi.org/project/mergeforge/) from

{adapters}
"""
