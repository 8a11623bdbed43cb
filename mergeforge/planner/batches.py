"""Batches: which pieces are carried together, and which files are finished after them.

A merge whose files stay here is one batch. One whose files are sent and removed as they are finished is cut at its
files, so that few of them lie on the disk at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergeforge.planner.tiling import TensorPlan


@dataclass(frozen=True)
class Batch:
    """Pieces that are carried together; `files`: those that they write; `finished`: those that nothing later writes."""

    tensor_plans: tuple[TensorPlan, ...]
    files: tuple[str, ...]
    finished: tuple[str, ...]


def at_once(pieces: Sequence[TensorPlan], files: Sequence[str]) -> Batch:
    """Everything in one batch."""
    return Batch(tuple(pieces), tuple(files), tuple(files))


def by_file(pieces: Sequence[TensorPlan], files: Sequence[str]) -> tuple[Batch, ...]:
    """A batch for each file that pieces write first, in the order of the files."""
    groups: dict[str, list[TensorPlan]] = {name: [] for name in files}
    for piece in pieces:
        groups[piece.encoders[0].file].append(piece)
    filled = [group for group in groups.values() if group]
    written = [_written(group) for group in filled]
    untouched = set(files).difference(*written)  # a header alone
    batches = []
    for at, group in enumerate(filled):
        here = written[at] | (untouched if at == 0 else set())
        later = set().union(*written[at + 1 :])
        batches.append(Batch(tuple(group), _in_order(here, files), _in_order(here - later, files)))
    return tuple(batches) or (at_once(pieces, files),)


def most_open(batches: Iterable[Batch], sizes: Mapping[str, int]) -> int:
    """The most bytes of files that are begun and not finished at any time."""
    most, begun = 0, set[str]()
    for batch in batches:
        begun |= set(batch.files)
        most = max(most, sum(sizes[name] for name in begun))
        begun -= set(batch.finished)
    return most


def _written(pieces: Iterable[TensorPlan]) -> set[str]:
    return {outlet.file for piece in pieces for outlet in piece.encoders}


def _in_order(names: set[str], files: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in files if name in names)
