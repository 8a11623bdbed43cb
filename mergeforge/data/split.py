"""Splitting: which rows are held out, by what they hold.

Rows are ordered by a hash of their content and of the seed; the first ones are held out. So the number is exact, equal
rows are on one side, and neither the order of the rows nor the names of the files matter. When rows are added,
those that were there keep their side, but for a few at the border.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergeforge.data.conversation import SURROGATE
from mergeforge.data.counts import Counts, Tally
from mergeforge.data.settings import DataSource
from mergeforge.data.source_reader import open_files, read_file
from mergeforge.data.stats import survey_source
from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.io.disk import disk_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIDES = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """What was written: rows by side; the counts are of what was read."""

    counts: Counts
    written: Mapping[str, int]


def held_out(keys: NDArray[np.uint64], wanted: float | int) -> NDArray[np.bool_]:
    """Which of the rows with these keys are held out. `wanted`: a share of the different rows, or a number of them.

    Raises RecipeError where nothing would be left to train on.
    """
    import numpy as np

    different = np.unique(keys)
    share = isinstance(wanted, float)
    count = max(1, round(wanted * len(different))) if share else int(wanted)
    if count >= len(different):
        text = f"val: {wanted:g} of {len(different)} different rows leaves none to train on"
        raise RecipeError(text, hint="hold out fewer, or give a path")
    held: NDArray[np.bool_] = keys <= different[count - 1]
    return held


def split(source: DataSource, wanted: float | int, out: Path, *, seed: int = 0, overwrite: bool = False) -> Split:
    """Write `train.jsonl` and `validation.jsonl` into a folder: rows with all their columns, in their order.

    Rows that cannot be used are counted and left out. Raises OutputError for files that are there already.
    """
    files = {side: out / f"{side}.jsonl" for side in SIDES}
    if there := [str(path) for path in files.values() if path.exists() and not overwrite]:
        raise OutputError(f"{' and '.join(there)} exists", hint="--overwrite, or another --out")
    tally, lengths, keys, _ = survey_source(source, seed)
    if not len(keys):
        raise SourceError(f"no row of {source.path} can be used")
    held = held_out(keys, wanted)
    try:
        out.mkdir(parents=True, exist_ok=True)
        parts = {side: Path(f"{path}.part") for side, path in files.items()}
        with (
            parts["train"].open("w", encoding="utf-8") as train,
            parts["validation"].open("w", encoding="utf-8") as val,
        ):
            _write_sides(source, held, train, val)
        for side in SIDES:
            os.replace(parts[side], files[side])
    except OSError as error:
        raise disk_error(error, str(out)) from error
    written = {"train": int((~held).sum()), "validation": int(held.sum())}
    return Split(replace(tally.counts(lengths, 0, keys), tokens=0), written)


def _write_sides(source: DataSource, held: NDArray[np.bool_], train: IO[str], validation: IO[str]) -> None:
    at = 0
    for file in open_files(source):
        for row in read_file(file, Tally()):
            if at == len(held):
                raise SourceError(f"{source.path} changed while it was read", hint="run again")
            (validation if held[at] else train).write(_line(row.value))
            at += 1


def _line(value: Mapping[str, Any]) -> str:
    """A row as a line of JSON; what is no UTF-8 text in it (in a column that is not used) is escaped."""
    line = json.dumps(value, ensure_ascii=False, default=str)
    return (json.dumps(value, default=str) if SURROGATE.search(line) else line) + "\n"
