"""When things happen in a run: steps of an epoch, of warm-up, between validations and between checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergeforge.train.settings import TrainSettings

NEVER = 1 << 62  # steps


@dataclass(frozen=True)
class Schedule:
    """A run in optimiser steps. `micro`: sequences a device and pass; `accumulate`: passes of one step."""

    micro_batch: int
    accumulation_steps: int
    per_epoch: int
    total: int
    warmup: int
    evaluate: int  # steps between two validations
    save: int  # steps between two checkpoints

    @property
    def epochs(self) -> float:
        return self.total / max(self.per_epoch, 1)


def make_schedule(
    settings: TrainSettings, sequences: int, rows: int, micro: int, epochs: float, devices: int = 1
) -> Schedule:
    """The schedule of `sequences` that hold `rows` rows of data, with `micro` sequences a pass on each device.

    A step takes about `batch.size` rows, packed or not.
    """
    rows_each = max(rows / max(sequences, 1), 1.0)
    wanted = max(1, round(settings.batch_size / rows_each / devices))  # sequences of a step, on each device
    accumulate = math.ceil(wanted / micro)
    micro = math.ceil(wanted / accumulate)
    batches = math.ceil(math.ceil(sequences / devices) / micro)
    per_epoch = math.ceil(batches / accumulate)
    total = settings.max_steps or max(1, math.ceil(per_epoch * epochs))
    return Schedule(
        micro,
        accumulate,
        per_epoch,
        total,
        _steps(settings.warmup, total),
        _steps(settings.eval.every, per_epoch) or NEVER,
        _steps(settings.save.every, per_epoch) or NEVER,
    )


def _steps(share: float, whole: int) -> int:
    """A share below 1 of `whole`, or a number of steps."""
    return math.ceil(share * whole) if share < 1 else int(share)
