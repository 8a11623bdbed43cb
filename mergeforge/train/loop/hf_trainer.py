"""The run on transformers' Trainer: its loop, optimizers and distribution; our order, loss, validation, checkpoints."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergeforge.train.loop.collate import EpochShuffler
from mergeforge.train.loop.context import MetricLogger, TrainingContext, save_model, validation_sums
from mergeforge.train.loop.optimizer import loadable_state, make_optimizer, optimizer_arguments, schedule_arguments
from mergeforge.train.loop.preference import RewardSums
from mergeforge.train.low_rank import LOW_RANK_OPTIMIZERS
from mergeforge.train.settings import EarlyStopSettings


@dataclasses.dataclass
class StopSignal:
    """Set by Ctrl-C: finish the step, write a checkpoint, end."""

    requested: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended: its last step, the best validation loss and its step, and whether it ended before its time."""

    step: int
    best_loss: float | None
    best_step: int | None
    interrupted: bool
    stopped_early: bool = False


def train(context: TrainingContext, checkpoint: Path | None, stop: StopSignal) -> TrainingOutcome:
    """Train to the end, from a checkpoint if there is one.

    Raises torch.OutOfMemoryError after writing the state of the last complete step to a checkpoint.
    """
    trainer: Any = _Trainer(context, stop)
    try:
        with loadable_state(context.optimizer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:
        trainer.model.zero_grad(set_to_none=True)
        trainer.save_last_step()
        raise
    state = trainer.state
    return TrainingOutcome(
        state.global_step,
        state.best_metric,
        state.best_global_step,
        interrupted=stop.requested and state.global_step < state.max_steps,
        stopped_early=trainer.progress.stopped_early,
    )


def arguments(context: TrainingContext) -> TrainingArguments:
    """transformers' TrainingArguments for a run. Raises RuntimeError where this version lacks one of them."""
    settings, schedule = context.settings, context.schedule
    values: dict[str, Any] = {
        "output_dir": str(context.folder.root),
        "per_device_train_batch_size": schedule.micro_batch,
        "gradient_accumulation_steps": schedule.accumulation_steps,
        "max_steps": schedule.total_steps,
        "learning_rate": context.lr,
        **schedule_arguments(settings, schedule),
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        **optimizer_arguments(context.optimizer, context.base_model, settings.optimizer_options),
        "bf16": context.dtype == "bf16",
        "fp16": context.dtype == "fp16",
        "use_cpu": context.device == "cpu",
        "seed": settings.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(settings.track) or "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": context.device != "cpu",
        "average_tokens_across_devices": True,
    }
    missing = values.keys() - {argument.name for argument in dataclasses.fields(TrainingArguments)}
    if missing:
        raise RuntimeError(f"this version of transformers has no TrainingArguments {', '.join(sorted(missing))}")
    return TrainingArguments(**values)


class _Trainer(Trainer):
    """transformers' Trainer with our sampler, metrics, validation and checkpoints."""

    def __init__(self, context: TrainingContext, stop: StopSignal) -> None:
        self.context = context
        self.metrics_file = MetricLogger(context)
        self.rewards = RewardSums()
        self.sampler = EpochShuffler(len(context.train), context.settings.seed)
        self.progress = _TrainerCallback(self, stop, context.settings.early_stop)
        callbacks: list[TrainerCallback] = [self.progress]
        super().__init__(
            model=context.model,
            args=arguments(context),
            train_dataset=context.train,
            data_collator=context.collator(weighted=context.weighted),
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # the loss is a sum over the tokens of all passes of a step
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                self.remove_callback(callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochShuffler:
        return self.sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        ratio = self.context.settings.lora.lr_ratio
        if self.optimizer is None and (ratio is not None or self.context.optimizer in LOW_RANK_OPTIMIZERS):
            self.optimizer = make_optimizer(self.context.model, self.args, ratio)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.context.folder.partial)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.metrics_file.add_batch(int((inputs["input_ids"] != self.context.pad).sum()) * self.args.world_size)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.context.preference is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.context.loss(model, inputs, num_items_in_batch, self.rewards) * self.args.world_size

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self.context.preference is None and not self.context.weighted:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(self.context.loss_count(batch) for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def reward_metrics(self, rewards: RewardSums, prefix: str = "") -> dict[str, float]:
        """The metrics of the rewards on all devices; clears them."""
        if self.args.world_size > 1:
            rewards.values = self.accelerator.reduce(rewards.values.to(self.args.device), "sum").cpu()
        metrics = rewards.metrics(prefix)
        rewards.clear()
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean over all validation tokens, not over batches."""
        started = time.monotonic()
        part = (self.args.process_index, self.args.world_size)
        rewards = RewardSums()
        sums = torch.tensor(validation_sums(self.model_wrapped, self.context, part, rewards), dtype=torch.float64)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        loss = float(sums[0] / sums[1])
        self.progress.add_validation(loss, self.state)
        self.metrics_file.validation(self.state.global_step, loss, self.reward_metrics(rewards, "eval_"))
        self.log({"eval_loss": loss})
        self.metrics_file.exclude_time(time.monotonic() - started)
        return {"eval_loss": loss}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write transformers' checkpoint under a temporary name, and rename it when it is complete."""
        started = time.monotonic()
        folder, step = self.context.folder, self.state.global_step
        if self.context.is_main:
            shutil.rmtree(folder.partial, ignore_errors=True)
            folder.partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.context.is_main:
            folder.commit_checkpoint(folder.partial / f"checkpoint-{step}", step)
            shutil.rmtree(folder.partial)
            folder.drop_old(self.context.settings.save.keep, self.state.best_global_step)
        self.accelerator.wait_for_everyone()
        self.metrics_file.exclude_time(time.monotonic() - started)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save and output_dir:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_model(self.context, Path(output_dir), self.accelerator.unwrap_model(self.model))

    def save_last_step(self) -> None:
        """Write a checkpoint of the last complete step, unless there is one."""
        if self.state.global_step and self.state.global_step not in self.context.folder.steps():
            self._save_checkpoint(self.context.model, None)


class _TrainerCallback(TrainerCallback):
    """Decides when to validate, to write a checkpoint and to stop; logs each step's numbers."""

    def __init__(self, trainer: _Trainer, stop: StopSignal, early_stop: EarlyStopSettings | None) -> None:
        self._trainer, self._stop, self._early_stop = trainer, stop, early_stop
        self._losses = trainer.context.folder.metric_values("eval_loss")
        self.stopped_early = False

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        schedule = self._trainer.context.schedule
        self._trainer.sampler.set_epoch(state.global_step // schedule.steps_per_epoch)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        schedule, step = self._trainer.context.schedule, state.global_step
        is_last = step >= state.max_steps
        step_of_epoch = step % schedule.steps_per_epoch or schedule.steps_per_epoch
        control.should_log = True
        if self._trainer.context.validation is not None:
            control.should_evaluate = is_last or step_of_epoch % schedule.eval_steps == 0
        control.should_save = is_last or step_of_epoch % schedule.save_steps == 0
        if self._stop.requested:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log = control.should_evaluate = control.should_save = False  # on_step_end did all of these

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            norm, rewards = logs.get("grad_norm"), self._trainer.reward_metrics(self._trainer.rewards)
            self._trainer.metrics_file.step(state.global_step, logs["loss"], logs["learning_rate"], norm, rewards)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped_early:
            control.should_save = control.should_training_stop = True

    def add_validation(self, loss: float, state: TrainerState) -> None:
        """Note whether a validation loss is the best so far, and stop after too many without improvement."""
        self._losses.append(loss)
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step
            self._trainer.control.should_save = True
        early_stop = self._early_stop
        if early_stop and evaluations_without_gain(self._losses, early_stop.threshold) >= early_stop.patience:
            control = self._trainer.control
            self.stopped_early = control.should_training_stop = control.should_save = True


def evaluations_without_gain(losses: Sequence[float], threshold: float) -> int:
    """How many of the last losses in a row are not lower than the best one before them by more than `threshold`."""
    best, count = float("inf"), 0
    for loss in losses:
        count = 0 if loss < best - threshold else count + 1
        best = min(best, loss)
    return count
