"""The run as a short loop, to read and to compare with: same order, loss, optimizer and rates as trainer.py.

One device, no checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler

from mergeforge.train.loop.chunked_loss import IGNORE_INDEX
from mergeforge.train.loop.collate import EpochShuffler
from mergeforge.train.loop.context import Batch, MetricLogger, TrainingContext, autocast, validation_sums
from mergeforge.train.loop.hf_trainer import SCHEDULES, StopSignal, TrainingOutcome, arguments


def train(job: TrainingContext, stop: StopSignal) -> TrainingOutcome:
    """Train to the end."""
    settings, schedule, metrics = job.settings, job.schedule, MetricLogger(job)
    trained = [one for one in job.model.parameters() if one.requires_grad]
    kind, given = Trainer.get_optimizer_cls_and_kwargs(arguments(job))
    optimizer = kind(trained, **given, weight_decay=settings.weight_decay)
    rates = get_scheduler(SCHEDULES[settings.schedule], optimizer, schedule.warmup, schedule.total)
    scaler = torch.amp.GradScaler(torch.device(job.device).type, enabled=job.dtype == "fp16")
    sampler = EpochShuffler(len(job.train), settings.seed)
    loader: DataLoader[Any] = DataLoader(job.train, schedule.micro_batch, sampler=sampler, collate_fn=job.collator())
    step, best = 0, (float("inf"), 0)
    job.model.train()
    while step < schedule.total and not stop.requested:
        sampler.set_epoch(step // schedule.per_epoch)
        for at, passes in enumerate(_all_reduce(loader, schedule.accumulation_steps), start=1):
            rate = rates.get_last_lr()[0]
            loss = _accumulate(job, passes, metrics, scaler)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or float("inf"))
            scaler.step(optimizer)
            scaler.update()
            rates.step()
            optimizer.zero_grad()
            step += 1
            metrics.step(step, loss, rate, float(norm))
            if job.validation is not None and (at % schedule.evaluate == 0 or step == schedule.total):
                total, count = validation_sums(job.model, job)
                best = min(best, (total / count, step))
                metrics.note({"step": step, "epoch": step / schedule.per_epoch, "eval_loss": total / count})
            if step == schedule.total or stop.requested:
                break
    known = best[1] > 0
    return TrainingOutcome(step, best[0] if known else None, best[1] if known else None, step < schedule.total)


def _accumulate(
    job: TrainingContext, passes: list[Batch], metrics: MetricLogger, scaler: torch.amp.GradScaler
) -> float:
    """The gradient of the mean loss of all trained tokens of these passes; that loss."""
    count = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in passes)
    loss = 0.0
    for batch in passes:
        metrics.add_batch(int((batch["input_ids"] != job.pad).sum()))
        given = {name: value.to(job.device) for name, value in batch.items()}
        with autocast(job):
            part = job.model(**given, num_items_in_batch=count)["loss"]
        scaler.scale(part).backward()
        loss += part.item()
    return loss


def _all_reduce(loader: DataLoader[Any], size: int) -> Iterator[list[Batch]]:
    """The batches of an epoch, `size` at a time."""
    batches = iter(loader)
    while some := list(islice(batches, size)):
        yield some
