"""Warnings that only a finished merge can give: changes that were lost to rounding, and no change at all."""

from __future__ import annotations

from mergeforge.core.messages import WarningText
from mergeforge.execute.change_stats import ChangeStats, base_of, total_change
from mergeforge.execute.journal import Journal
from mergeforge.planner import Plan

MOST_LOST = 0.5  # share of the changes


def result_warnings(plan: Plan, journal: Journal) -> tuple[WarningText, ...]:
    """Warnings about the measured changes of all tensors together."""
    change = total_change(
        ChangeStats(*stats)  # type: ignore[arg-type]  # numbers
        for tensor_plan in plan.tensor_plans
        if base_of(tensor_plan.tensor) is not None
        for stats in journal.change_stats(tensor_plan.info.name)
    )
    if not change.elements:
        return ()
    if not change.changed:
        return (WarningText("the merge changes nothing: every tensor equals the base model's"),)
    lost = change.lost_to_rounding / change.changed
    if lost <= MOST_LOST:
        return ()
    text = f"{lost:.1%} of the changes are too small for the dtype that is written and were lost to rounding"
    return (WarningText(f"{text}: write float32 (dtype: float32), or give the changes a larger weight"),)
