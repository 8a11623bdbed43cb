"""Schedule: the number of steps in a run, in an epoch, in the warm-up, between validations and between checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergeforge.train.settings import TrainSettings

NEVER = 1 << 62  # steps


@dataclass(frozen=True)
class Schedule:
    """A run in optimizer steps. `micro_batch`: sequences per device and pass; `accumulation_steps`: passes per step."""

    micro_batch: int
    accumulation_steps: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int  # between two validations
    save_steps: int  # between two checkpoints
    decay_steps: int = 0  # at the end of a warmup-stable-decay schedule

    @property
    def epochs(self) -> float:
        return self.total_steps / max(self.steps_per_epoch, 1)


def make_schedule(
    settings: TrainSettings, sequences: int, rows: int, micro_batch: int, epochs: float, devices: int = 1
) -> Schedule:
    """The schedule for `sequences` that hold `rows` rows of data, with `micro_batch` sequences per pass on each device.

    A step takes about `batch.size` rows, packed or not.
    """
    rows_per_sequence = max(rows / max(sequences, 1), 1.0)
    sequences_per_step = max(1, round(settings.batch_size / rows_per_sequence / devices))  # on each device
    accumulation_steps = math.ceil(sequences_per_step / micro_batch)
    micro_batch = math.ceil(sequences_per_step / accumulation_steps)
    passes = math.ceil(math.ceil(sequences / devices) / micro_batch)
    steps_per_epoch = math.ceil(passes / accumulation_steps)
    total_steps = settings.max_steps or max(1, math.ceil(steps_per_epoch * epochs))
    return Schedule(
        micro_batch,
        accumulation_steps,
        steps_per_epoch,
        total_steps,
        _steps(settings.warmup, total_steps),
        _steps(settings.eval.every, steps_per_epoch) or NEVER,
        _steps(settings.save.every, steps_per_epoch) or NEVER,
        _steps(settings.decay, total_steps),
    )


def _steps(interval: float, whole: int) -> int:
    """A fraction below 1 of `whole`, or a number of steps."""
    return math.ceil(interval * whole) if interval < 1 else int(interval)
