"""Objectives: what training optimizes. All but `sft` learn from preferences between answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.data.settings import LABELED, PAIRS, PREFERENCE_FORMATS
from mergeforge.recipe.schema import ReportProblem

SFT, KTO = "sft", "kto"
REWARD_METRICS = ("margin", "accuracy")  # of a preference objective, beside its loss


@dataclass(frozen=True)
class Objective:
    """An objective's needs and defaults.

    `format`: the format of its data. `reference`: whether it compares with the base model, which is the model with its
    adapter switched off. `beta`, `gamma`: defaults, as in the objective's paper. `extra_passes`: forward passes of a
    step that have no backward pass.
    """

    name: str
    format: str
    reference: bool
    beta: float
    gamma: float | None = None
    extra_passes: int = 0

    @property
    def answers(self) -> int:
        """Answers that a row of data has, each a sequence of tokens."""
        return 2 if self.format == PAIRS else 1

    @property
    def is_preference(self) -> bool:
        return self.name != SFT


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(SFT, "auto", reference=False, beta=0.0),
        Objective("dpo", PAIRS, reference=True, beta=0.1, extra_passes=1),
        Objective("ipo", PAIRS, reference=True, beta=0.1, extra_passes=1),
        Objective("orpo", PAIRS, reference=False, beta=0.1),
        Objective(KTO, LABELED, reference=True, beta=0.1, extra_passes=3),
        Objective("simpo", PAIRS, reference=False, beta=2.0, gamma=1.0),
    )
}


@dataclass(frozen=True)
class PreferenceOptions:
    """Settings of a preference objective. `beta`, `gamma` None: the objective's default.

    `desirable_weight`, `undesirable_weight`: of good and bad answers in KTO.
    """

    beta: float | None = None
    gamma: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def check_objective(values: Mapping[str, Any], report: ReportProblem) -> None:
    """Report what does not go with the objective in the checked values of train.yaml."""
    objective = OBJECTIVES[values.get("objective", SFT)]
    _check_options(objective, values.get("preference") or {}, report)
    _check_formats(objective, values.get("data") or (), report)
    if not objective.is_preference:
        return
    for key in ("loss", "loss_on"):
        if key in values:
            report((key,), f"objective: {objective.name} has its own loss, on the answers", f"remove '{key}'")
    if objective.reference:
        _check_reference(objective.name, values, report)
    batch = values.get("batch") or {}
    if objective.name == KTO and (batch.get("size") == 1 or (batch.get("micro") == 1 and not values.get("pack"))):
        text = "kto compares an answer with others of the same pass: there must be at least 2"
        report(("batch",), text, "set batch: {size: 16, micro: 2} or more")


def _check_options(objective: Objective, options: Mapping[str, Any], report: ReportProblem) -> None:
    only = {"gamma": ("simpo",), "desirable_weight": (KTO,), "undesirable_weight": (KTO,)}
    for key in options:
        allowed = only.get(key) or tuple(name for name in OBJECTIVES if name != SFT)
        if objective.name not in allowed:
            report(("preference", key), f"objective: {objective.name} has no {key}", f"it is for {', '.join(allowed)}")
    if options.get("beta") == 0:
        report(("preference", "beta"), "beta must be more than 0", f"the default is {objective.beta:g}")


def _check_formats(objective: Objective, sources: Sequence[Any], report: ReportProblem) -> None:
    for index, source in enumerate(sources):
        format = source.get("format", "auto") if isinstance(source, Mapping) else "auto"
        path = ("data", index, "format")
        if objective.is_preference and format not in ("auto", PAIRS, objective.format):
            report(path, f"objective: {objective.name} cannot train on {format} data", "remove 'format'")
        if format in PREFERENCE_FORMATS and not objective.is_preference:
            report(path, f"{format} data needs a preference objective", "set objective: dpo or kto")


def _check_reference(name: str, values: Mapping[str, Any], report: ReportProblem) -> None:
    """The reference is the base, without the adapter."""
    if values.get("method") == "full":
        text = f"{name} compares with the base, which is the model without its adapter: full training has none"
        report(("method",), text, "set method: lora or qlora, or objective: orpo or simpo")
    init = (values.get("lora") or {}).get("init")
    if init in ("pissa", "olora"):
        report(("lora", "init"), f"{init} changes the base's weights, but {name} compares with them", "remove 'init'")
    if init == "loftq":
        text = f"with loftq the model does not begin as its 4-bit base, which {name} compares with"
        report(("lora", "init"), text, "remove 'init'")
