"""The run as a short loop, to read and to compare with: same order, loss, optimizer and schedule as hf_trainer.py.

One device, no checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from mergeforge.train.loop.collate import EpochShuffler
from mergeforge.train.loop.context import Batch, MetricLogger, TrainingContext, autocast, validation_sums
from mergeforge.train.loop.hf_trainer import StopSignal, TrainingOutcome, arguments
from mergeforge.train.loop.optimizer import make_optimizer, make_rates
from mergeforge.train.loop.preference import RewardSums


def train(context: TrainingContext, stop: StopSignal) -> TrainingOutcome:
    """Train to the end."""
    settings, schedule, metrics = context.settings, context.schedule, MetricLogger(context)
    trained = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(context.model, arguments(context), settings.lora.lr_ratio)
    rates = make_rates(settings, schedule, optimizer)
    scaler = torch.amp.GradScaler(torch.device(context.device).type, enabled=context.dtype == "fp16")
    sampler = EpochShuffler(len(context.train), settings.seed)
    loader: DataLoader[Any] = DataLoader(
        context.train, schedule.micro_batch, sampler=sampler, collate_fn=context.collator(weighted=context.weighted)
    )
    step, best = 0, (float("inf"), 0)
    context.model.train()
    while step < schedule.total_steps and not stop.requested:
        sampler.set_epoch(step // schedule.steps_per_epoch)
        for step_of_epoch, passes in enumerate(_grouped(loader, schedule.accumulation_steps), start=1):
            rate = rates.get_last_lr()[0]
            rewards = RewardSums()
            loss = _accumulate(context, passes, metrics, scaler, rewards)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or float("inf"))
            scaler.step(optimizer)
            scaler.update()
            rates.step()
            optimizer.zero_grad()
            step += 1
            is_last = step == schedule.total_steps
            metrics.step(step, loss, rate, float(norm), rewards.metrics())
            if context.validation is not None and (step_of_epoch % schedule.eval_steps == 0 or is_last):
                eval_rewards = RewardSums()
                total, count = validation_sums(context.model, context, rewards=eval_rewards)
                best = min(best, (total / count, step))
                metrics.validation(step, total / count, eval_rewards.metrics("eval_"))
            if is_last or stop.requested:
                break
    best_loss, best_step = best if best[1] else (None, None)
    return TrainingOutcome(step, best_loss, best_step, interrupted=step < schedule.total_steps)


def _accumulate(
    context: TrainingContext,
    passes: list[Batch],
    metrics: MetricLogger,
    scaler: torch.amp.GradScaler,
    rewards: RewardSums,
) -> float:
    """Accumulate the gradient of the mean loss over these passes; returns that loss."""
    count = sum(context.loss_count(batch) for batch in passes)
    loss = 0.0
    for batch in passes:
        metrics.add_batch(int((batch["input_ids"] != context.pad).sum()))
        inputs = {name: tensor.to(context.device) for name, tensor in batch.items()}
        with autocast(context):
            pass_loss = context.loss(context.model, inputs, count, rewards)
        scaler.scale(pass_loss).backward()
        loss += pass_loss.item()
    return loss


def _grouped(loader: DataLoader[Any], size: int) -> Iterator[list[Batch]]:
    """The batches of an epoch, `size` at a time."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group
