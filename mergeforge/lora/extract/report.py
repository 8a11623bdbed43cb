"""The results of an extraction: extraction.json and the adapter's model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.hub.model_card import write_card
from mergeforge.lora.extract.pairing import TensorPair
from mergeforge.lora.extract.plan import Extraction

FORMAT = 1
EXPERT_MODULE = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class PairResult:
    """The result of one pair. Norms are Frobenius norms, None if they were not computed.

    `norm`: |D| of D = tuned - base. `rank` 0: no factors. `energy`: the fraction of |D|^2 that the factors keep.
    `error`: |D - BA| / |D| for the factors as they are written.
    """

    pair: TensorPair
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
        """Excluded by the user, so it was not read."""
        return self.pair.is_left_out


@dataclass(frozen=True)
class ExtractionReport:
    """All results, sorted by tensor name."""

    plan: Extraction
    results: tuple[PairResult, ...]

    @property
    def factored(self) -> list[PairResult]:
        return [result for result in self.results if result.rank]

    @property
    def changed(self) -> list[PairResult]:
        return [result for result in self.results if result.changed and not result.left_out]

    @property
    def not_held(self) -> list[PairResult]:
        """Changes that the adapter does not contain."""
        return [result for result in self.changed if result.pair.treatment not in ("factor", "save")]

    @property
    def saved_modules(self) -> list[str]:
        """Modules that are saved whole: those with a changed weight."""
        saved = {
            result.pair.module
            for result in self.changed
            if result.pair.treatment == "save" and result.pair.parameter == "weight"
        }
        return sorted(saved)

    @property
    def saved(self) -> Mapping[str, TensorPair]:
        """Key without PEFT's prefix -> a tensor that is saved whole.

        PEFT needs all tensors of such a module. If only the bias changed, it is saved under its own name, or under
        that of the inner layer if PEFT wraps the module.
        """
        modules, wrapped = set(self.saved_modules), {result.pair.module for result in self.factored}
        saved = {}
        for result in self.results:
            if result.pair.module in modules:
                saved[result.pair.name] = result.pair
            elif result.changed and result.pair.treatment == "save":
                wrapper = ".base_layer" if result.pair.module in wrapped else ""
                saved[f"{result.pair.module}{wrapper}.{result.pair.parameter}"] = result.pair
        return saved

    @property
    def saves_biases(self) -> bool:
        return any(pair.parameter == "bias" and pair.module not in self.saved_modules for pair in self.saved.values())

    @property
    def notes(self) -> list[str]:
        """What PEFT may not be able to load; mergeforge folds the adapter by the checkpoint's names."""
        notes = []
        experts = [
            result
            for result in self.results
            if EXPERT_MODULE.search(result.pair.module) and result.pair.treatment == "factor"
        ]
        if len({result.rank for result in experts}) > 1:
            text = "experts have different ranks, or some are unchanged"
            notes.append(f"{text}: PEFT needs one rank for all, as transformers fuses them; mergeforge does not")
        if any(key in self.plan.tuned.config for key in ("vision_config", "audio_config")):
            text = "modules are named as in the checkpoint; transformers may use other names for this kind of model"
            notes.append(f"{text}, and then only mergeforge can load the adapter")
        return notes

    @property
    def error(self) -> float:
        """The relative error of the factors, over all factored modules together."""
        total = sum((result.norm or 0.0) ** 2 for result in self.factored)
        return (
            math.sqrt(sum((result.error * (result.norm or 0.0)) ** 2 for result in self.factored) / total)
            if total
            else 0.0
        )

    @property
    def total_error(self) -> float:
        """The same over all changes that were read; a change that is not stored counts as lost."""
        total = sum((result.norm or 0.0) ** 2 for result in self.changed)
        lost = sum((result.error * (result.norm or 0.0)) ** 2 for result in self.factored)
        lost += sum((result.norm or 0.0) ** 2 for result in self.not_held)
        return math.sqrt(lost / total) if total else 0.0


def make_report(plan: Extraction, results: Sequence[PairResult]) -> ExtractionReport:
    return ExtractionReport(plan, tuple(sorted(results, key=lambda result: result.pair.name)))


def report_json(report: ExtractionReport) -> bytes:
    """Write extraction.json: the same bytes for the same inputs and options, for any memory and number of threads."""
    plan = report.plan
    value = {
        "format": FORMAT,
        "mergeforge": version("mergeforge"),
        "inputs": {"tuned": _input_entry(plan.tuned), "base": _input_entry(plan.base)},
        "options": {
            "rank": plan.target.rank,
            "energy": plan.target.energy,
            "svd": plan.target.svd,
            "embeddings": plan.filter.embeddings,
            "save_rest": plan.filter.save_rest,
            "include": list(plan.filter.include),
            "exclude": list(plan.filter.exclude),
            "dtype": plan.dtype,
        },
        "device": plan.budget.device.partition(":")[0],
        "error": report.error,
        "total_error": report.total_error,
        "modules": {result.pair.module: _module_entry(result) for result in report.factored},
        "saved": {key: {"shape": list(pair.tuned.info.shape)} for key, pair in sorted(report.saved.items())},
        "not_held": {result.pair.name: _missing_entry(result) for result in report.not_held},
        "left_out": sorted(result.pair.name for result in report.results if result.left_out),
        "notes": report.notes,
        "unchanged": sum(not result.changed for result in report.results),
    }
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def adapter_card(report: ExtractionReport) -> str:
    """Write README.md: front matter for the Hub, and what the adapter contains and does not contain."""
    plan = report.plan
    front: dict[str, Any] = {"library_name": "peft", "tags": ["mergeforge", "lora"]}
    if not Path(plan.base_ref.path).exists():
        front = {"base_model": plan.base_ref.path, "base_model_relation": "adapter"} | front
    lines = [f"- {_missing_line(result)}" for result in report.not_held]
    lacks = "\n".join(["", "## Changes that it does not contain", "", *lines, ""]) if lines else ""
    ranks = sorted({result.rank for result in report.factored})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    tuned, base = _display_name(plan.tuned), _display_name(plan.base)
    body = f"""The difference of {tuned} and {base} as a LoRA adapter, extracted with
mergeforge: {_counts(report, rank)}.

Folded into {base}, it has an error of {100 * report.error:.3g} % of the change
(|D - BA| / |D| over all modules, Frobenius norm). `extraction.json` lists the error of each module.
{lacks}"""
    return write_card(front, plan.out.name, body)


def _counts(report: ExtractionReport, rank: str) -> str:
    factored, saved = len(report.factored), len(report.saved)
    modules = f"{factored} module{'' if factored == 1 else 's'} of rank {rank}"
    return modules + (f", {saved} tensor{'' if saved == 1 else 's'} saved whole" if saved else "")


def _module_entry(result: PairResult) -> dict[str, Any]:
    return {
        "shape": list(result.pair.tuned.info.shape),
        "rank": result.rank,
        "method": result.method,
        "norm": result.norm,
        "energy": result.energy,
        "error": result.error,
    }


def _missing_entry(result: PairResult) -> dict[str, Any]:
    return {"norm": result.norm, "relative": _relative(result), "why": result.pair.treatment}


def _missing_line(result: PairResult) -> str:
    relative = _relative(result)
    change = "" if relative is None else f", which changed by {100 * relative:.3g} %"
    return f"`{result.pair.name}`{change}: {result.pair.treatment}"


def _relative(result: PairResult) -> float | None:
    if result.norm is None or not result.base_norm:
        return None
    return result.norm / result.base_norm


def _input_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.label,
        "revision": checkpoint.revision,
        "files": dict(sorted(checkpoint.file_hashes.items())),
    }


def _display_name(checkpoint: Checkpoint) -> str:
    return Path(checkpoint.label).name if Path(checkpoint.label).is_absolute() else checkpoint.label
