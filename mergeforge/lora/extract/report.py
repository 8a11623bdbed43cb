"""What an extraction found: extraction.json, and the adapter's card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.lora.extract.pairing import Pair
from mergeforge.lora.extract.plan import Extraction

FORMAT = 1
EXPERT = re.compile(r"\.experts\.\d+\.")
PREFIX = "base_model.model."  # of every key that PEFT writes


@dataclass(frozen=True)
class Found:
    """What was found of a pair: norms are Frobenius, None where nothing was computed.

    `norm`: of tuned - base, |D|. `rank` 0: no factors. `energy`: the share of |D|^2 that the factors
    keep. `error`: |D - BA| / |D| of the factors as they are written.
    """

    pair: Pair
    norm: float | None
    base_norm: float | None
    rank: int = 0
    method: str = ""
    energy: float = 1.0
    error: float = 0.0

    @property
    def changed(self) -> bool:
        return self.norm != 0.0

    @property
    def left_out(self) -> bool:
        """The user named it as not wanted, so it was not looked at."""
        return self.pair.is_left_out


@dataclass(frozen=True)
class Report:
    """Everything that was found, in the order of the module names."""

    plan: Extraction
    found: tuple[Found, ...]

    @property
    def factored(self) -> list[Found]:
        return [one for one in self.found if one.rank]

    @property
    def changed(self) -> list[Found]:
        return [one for one in self.found if one.changed and not one.left_out]

    @property
    def not_held(self) -> list[Found]:
        """Changes that the adapter lacks."""
        return [one for one in self.changed if one.pair.way not in ("factor", "save")]

    @property
    def saved_modules(self) -> list[str]:
        """Modules that are held whole: those with a changed weight."""
        saved = {one.pair.module for one in self.changed if one.pair.way == "save" and one.pair.leaf == "weight"}
        return sorted(saved)

    @property
    def saved(self) -> Mapping[str, Pair]:
        """Key without PEFT's prefix -> what is held whole.

        PEFT wants every tensor of such a module. A changed bias alone goes under its own name, or
        that of the layer inside where PEFT wraps its module.
        """
        modules, wrapped = set(self.saved_modules), {one.pair.module for one in self.factored}
        held = {}
        for one in self.found:
            if one.pair.module in modules:
                held[one.pair.name] = one.pair
            elif one.changed and one.pair.way == "save":
                inner = ".base_layer" if one.pair.module in wrapped else ""
                held[f"{one.pair.module}{inner}.{one.pair.leaf}"] = one.pair
        return held

    @property
    def saves_biases(self) -> bool:
        return any(pair.leaf == "bias" and pair.module not in self.saved_modules for pair in self.saved.values())

    @property
    def notes(self) -> list[str]:
        """What PEFT may not load; mergeforge folds the adapter by the checkpoint's own names."""
        notes = []
        experts = [one for one in self.found if EXPERT.search(one.pair.module) and one.pair.way == "factor"]
        if len({one.rank for one in experts}) > 1:
            text = "experts have different ranks or are unchanged"
            notes.append(
                f"{text}: PEFT, for which transformers fuses them, needs one rank for all; mergeforge does not"
            )
        if any(key in self.plan.tuned.config for key in ("vision_config", "audio_config")):
            text = "modules are named as in the checkpoint; transformers may name those of such a model otherwise"
            notes.append(f"{text}, and then only mergeforge finds them")
        return notes

    @property
    def error(self) -> float:
        """The factors' error over all factored modules together, relative."""
        total = sum((one.norm or 0.0) ** 2 for one in self.factored)
        return math.sqrt(sum((one.error * (one.norm or 0.0)) ** 2 for one in self.factored) / total) if total else 0.0

    @property
    def total_error(self) -> float:
        """The same over every change that was looked at: what is not held counts whole."""
        total = sum((one.norm or 0.0) ** 2 for one in self.changed)
        lost = sum((one.error * (one.norm or 0.0)) ** 2 for one in self.factored)
        lost += sum((one.norm or 0.0) ** 2 for one in self.not_held)
        return math.sqrt(lost / total) if total else 0.0


def make_report(plan: Extraction, found: Sequence[Found]) -> Report:
    return Report(plan, tuple(sorted(found, key=lambda one: one.pair.name)))


def report_json(report: Report) -> bytes:
    """extraction.json: the same bytes for the same inputs and options, whatever the memory and threads."""
    plan = report.plan
    value = {
        "format": FORMAT,
        "mergeforge": version("mergeforge"),
        "inputs": {"tuned": _input(plan.tuned), "base": _input(plan.base)},
        "options": {
            "rank": plan.wanted.rank,
            "energy": plan.wanted.energy,
            "svd": plan.wanted.svd,
            "embeddings": plan.choice.embeddings,
            "save_rest": plan.choice.save_rest,
            "include": list(plan.choice.include),
            "exclude": list(plan.choice.exclude),
            "dtype": plan.dtype,
        },
        "device": plan.budget.device.partition(":")[0],
        "error": report.error,
        "total_error": report.total_error,
        "modules": {one.pair.module: _module(one) for one in report.factored},
        "saved": {key: {"shape": list(pair.tuned.info.shape)} for key, pair in sorted(report.saved.items())},
        "not_held": {one.pair.name: _missing(one) for one in report.not_held},
        "left_out": sorted(one.pair.name for one in report.found if one.left_out),
        "notes": report.notes,
        "unchanged": sum(not one.changed for one in report.found),
    }
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def adapter_card(report: Report) -> str:
    """README.md: front matter for the Hub, and what the adapter holds and lacks."""
    plan = report.plan
    front: dict[str, Any] = {"library_name": "peft", "tags": ["mergeforge", "lora"]}
    if not Path(plan.base_ref.path).exists():
        front = {"base_model": plan.base_ref.path, "base_model_relation": "adapter"} | front
    lines = [f"- {_missing_line(one)}" for one in report.not_held]
    lacks = "\n".join(["", "## What it lacks", "", *lines, ""]) if lines else ""
    ranks = sorted({one.rank for one in report.factored})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---
# {plan.out.name}

The difference of {_shown(plan.tuned)} and {_shown(plan.base)} as a LoRA adapter, extracted with
[mergeforge](https://pypi.org/project/mergeforge/): {len(report.factored)} modules of rank {rank},
{len(report.saved)} tensors whole.

Folded into {_shown(plan.base)} it leaves an error of {100 * report.error:.3g} % of the change
(|D - BA| / |D| over all modules, Frobenius). `extraction.json` has every module's.
{lacks}"""


def _module(one: Found) -> dict[str, Any]:
    return {
        "shape": list(one.pair.tuned.info.shape),
        "rank": one.rank,
        "method": one.method,
        "norm": one.norm,
        "energy": one.energy,
        "error": one.error,
    }


def _missing(one: Found) -> dict[str, Any]:
    return {"norm": one.norm, "relative": _relative(one), "why": one.pair.way}


def _missing_line(one: Found) -> str:
    relative = _relative(one)
    size = "" if relative is None else f", which changed by {100 * relative:.3g} %"
    return f"`{one.pair.name}`{size}: {one.pair.way}"


def _relative(one: Found) -> float | None:
    if one.norm is None or not one.base_norm:
        return None
    return one.norm / one.base_norm


def _input(table: Checkpoint) -> dict[str, Any]:
    return {"name": table.label, "revision": table.revision, "files": dict(sorted(table.file_hashes.items()))}


def _shown(table: Checkpoint) -> str:
    return Path(table.label).name if Path(table.label).is_absolute() else table.label
