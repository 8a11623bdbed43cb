"""How many tokens the largest batch of a run has: seldom as many as its longest sequences would allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeforge.train.packing import pack_rows
from mergeforge.train.schedule import make_schedule
from mergeforge.train.settings import TrainSettings
from mergeforge.train.training_setup import TrainingSetup

WIDTH_MULTIPLE = 8  # of a batch's width (loop/collate.py)


def largest_batch(lengths: Sequence[int] | Any, settings: TrainSettings, setup: TrainingSetup, *, packed: bool) -> int:
    """Tokens of the largest batch, padding included. `lengths`: tokens of each training example.

    Examples longer than setup.seq_len count as that long. One process is assumed; several have smaller batches.
    """
    import numpy as np

    tokens, answers = np.minimum(np.asarray(lengths), setup.seq_len), settings.answers
    rows = len(tokens) // answers
    if not packed:
        return _sequences(settings, setup, rows, rows) * answers * _width(int(tokens.max()))
    try:
        packs = pack_rows(tokens, setup.seq_len, answers=answers)
    except ValueError:  # a row whose answers do not fit together; the plan refuses it
        return setup.tokens
    longest = max(int(tokens[pack].sum()) for pack in packs)
    return _sequences(settings, setup, len(packs), rows) * _width(longest)


def _sequences(settings: TrainSettings, setup: TrainingSetup, sequences: int, rows: int) -> int:
    """Sequences in a batch: the schedule makes batches smaller than setup.micro_batch where a step has fewer."""
    schedule = make_schedule(settings, sequences, rows, setup.micro_batch, epochs=1)
    return min(schedule.micro_batch, sequences)


def _width(longest: int) -> int:
    return -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
