"""Splits rows into training and validation data by their content.

Rows are ordered by a hash of their content and the seed, and the first ones are held out. So the number is exact, equal
rows are on the same side, and neither the order of the rows nor the names of the files matter. When rows are added, the
old ones stay on their side, except for a few at the boundary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergeforge.data.conversation import SURROGATE
from mergeforge.data.counts import DataStats, RecordCounter
from mergeforge.data.settings import DataSource
from mergeforge.data.source_reader import open_files, parse_file
from mergeforge.data.stats import source_stats
from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.io.disk import disk_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class SplitResult:
    """What was written: the statistics of the input, and rows by split."""

    counts: DataStats
    written: Mapping[str, int]


def validation_mask(keys: NDArray[np.uint64], size: float | int) -> NDArray[np.bool_]:
    """Which of the rows with these keys are held out. size: a fraction or a number of the distinct rows.

    Raises RecipeError if nothing would be left to train on.
    """
    import numpy as np

    distinct = np.unique(keys)
    count = max(1, round(size * len(distinct))) if isinstance(size, float) else int(size)
    if count >= len(distinct):
        text = f"val: {size:g} of {len(distinct)} distinct rows leaves none to train on"
        raise RecipeError(text, hint="hold out fewer, or give a path")
    mask: NDArray[np.bool_] = keys <= distinct[count - 1]
    return mask


def split(source: DataSource, size: float | int, out: Path, *, seed: int = 0, overwrite: bool = False) -> SplitResult:
    """Write `train.jsonl` and `validation.jsonl` into a folder: rows with all their columns, in their order.

    Unusable rows are counted and left out. Raises OutputError if the files exist.
    """
    files = {name: out / f"{name}.jsonl" for name in SPLITS}
    if existing := [str(path) for path in files.values() if path.exists() and not overwrite]:
        verb = "exist" if len(existing) > 1 else "exists"
        raise OutputError(f"{' and '.join(existing)} already {verb}", hint="--overwrite, or another --out")
    counter, lengths, keys, _ = source_stats(source, seed)
    if not len(keys):
        raise SourceError(f"no row of {source.path} can be used")
    held_out = validation_mask(keys, size)
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = {name: Path(f"{path}.part") for name, path in files.items()}
        with (
            temporary["train"].open("w", encoding="utf-8") as train,
            temporary["validation"].open("w", encoding="utf-8") as validation,
        ):
            _write_splits(source, held_out, train, validation)
        for name in SPLITS:
            os.replace(temporary[name], files[name])
    except OSError as error:
        raise disk_error(error, str(out)) from error
    written = {"train": int((~held_out).sum()), "validation": int(held_out.sum())}
    return SplitResult(replace(counter.stats(lengths, 0, keys), tokens=0), written)


def _write_splits(source: DataSource, held_out: NDArray[np.bool_], train: IO[str], validation: IO[str]) -> None:
    index = 0
    for file in open_files(source):
        for row in parse_file(file, RecordCounter()):
            if index == len(held_out):
                raise SourceError(f"{source.path} changed while it was read", hint="run the command again")
            (validation if held_out[index] else train).write(_json_line(row.value))
            index += 1


def _json_line(value: Mapping[str, Any]) -> str:
    """A row as a line of JSON, escaped if an unused column holds anything that is not UTF-8."""
    line = json.dumps(value, ensure_ascii=False, default=str)
    return (json.dumps(value, default=str) if SURROGATE.search(line) else line) + "\n"
