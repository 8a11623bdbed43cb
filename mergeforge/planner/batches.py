"""Batches: which tensors run together, and which files are finished after them.

A merge whose files stay on this disk is one batch. A merge that uploads each finished file and removes it here is split
at its files, so that few of them take up disk space at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergeforge.planner.tiling import TensorPlan


@dataclass(frozen=True)
class Batch:
    """Tensors that run together. `files`: what they write to; `finished`: files that no later batch writes to."""

    tensor_plans: tuple[TensorPlan, ...]
    files: tuple[str, ...]
    finished: tuple[str, ...]


def one_batch(tensor_plans: Sequence[TensorPlan], files: Sequence[str]) -> Batch:
    """Everything in one batch."""
    return Batch(tuple(tensor_plans), tuple(files), tuple(files))


def batch_per_file(tensor_plans: Sequence[TensorPlan], files: Sequence[str]) -> tuple[Batch, ...]:
    """A batch for each file that is some tensor's first, in the order of the files."""
    groups: dict[str, list[TensorPlan]] = {name: [] for name in files}
    for tensor_plan in tensor_plans:
        groups[tensor_plan.encoders[0].file].append(tensor_plan)
    filled = [group for group in groups.values() if group]
    written = [_written(group) for group in filled]
    header_only = set(files).difference(*written)
    batches = []
    for number, group in enumerate(filled):
        names = written[number] | (header_only if number == 0 else set())
        later = set().union(*written[number + 1 :])
        batches.append(Batch(tuple(group), _in_order(names, files), _in_order(names - later, files)))
    return tuple(batches) or (one_batch(tensor_plans, files),)


def peak_disk(batches: Iterable[Batch], sizes: Mapping[str, int]) -> int:
    """The most bytes of files that are unfinished at the same time."""
    peak, unfinished = 0, set[str]()
    for batch in batches:
        unfinished |= set(batch.files)
        peak = max(peak, sum(sizes[name] for name in unfinished))
        unfinished -= set(batch.finished)
    return peak


def _written(tensor_plans: Iterable[TensorPlan]) -> set[str]:
    return {encoder.file for tensor_plan in tensor_plans for encoder in tensor_plan.encoders}


def _in_order(names: set[str], files: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in files if name in names)
