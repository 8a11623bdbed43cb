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
from mergeforge.train.settings import EarlyStopSettings

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclasses.dataclass
class StopSignal:
    """Asked for from outside, by Ctrl-C: finish the step, write a checkpoint, end."""

    requested: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended: its last step, the best validation loss and its step, whether it was stopped early."""

    step: int
    best_loss: float | None
    best_step: int | None
    interrupted: bool
    stopped_early: bool = False


def train(job: TrainingContext, checkpoint: Path | None, stop: StopSignal) -> TrainingOutcome:
    """Train to the end, from a checkpoint if there is one.

    Raises torch.OutOfMemoryError; then the newest state is in a checkpoint of its own.
    """
    run: Any = _Trainer(job, stop)
    try:
        run.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:
        run.model.zero_grad(set_to_none=True)
        run.save_state()
        raise
    state = run.state
    return TrainingOutcome(
        state.global_step,
        state.best_metric,
        state.best_global_step,
        interrupted=stop.requested and state.global_step < state.max_steps,
        stopped_early=run.timing.ended_early,
    )


def arguments(job: TrainingContext) -> TrainingArguments:
    """transformers' TrainingArguments of a job. Fails loudly where this version lacks one of them."""
    settings, schedule = job.settings, job.schedule
    wanted: dict[str, Any] = {
        "output_dir": str(job.folder.root),
        "per_device_train_batch_size": schedule.micro_batch,
        "gradient_accumulation_steps": schedule.accumulation_steps,
        "max_steps": schedule.total,
        "learning_rate": job.lr,
        "lr_scheduler_type": SCHEDULES[settings.schedule],
        "warmup_steps": schedule.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": job.optimizer,
        "bf16": job.dtype == "bf16",
        "fp16": job.dtype == "fp16",
        "use_cpu": job.device == "cpu",
        "seed": settings.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(settings.track) or "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": job.device != "cpu",
        "average_tokens_across_devices": True,
    }
    missing = wanted.keys() - {one.name for one in dataclasses.fields(TrainingArguments)}
    if missing:
        raise RuntimeError(f"this transformers has no TrainingArguments {', '.join(sorted(missing))}")
    return TrainingArguments(**wanted)


class _Trainer(Trainer):
    """transformers' loop over a job."""

    def __init__(self, job: TrainingContext, stop: StopSignal) -> None:
        self.job = job
        self.metrics_file = MetricLogger(job)
        self.sampler = EpochShuffler(len(job.train), job.settings.seed)
        self.timing = _TrainerCallback(self, stop, job.settings.early_stop)
        callbacks: list[TrainerCallback] = [self.timing]
        super().__init__(
            model=job.model,
            args=arguments(job),
            train_dataset=job.train,
            data_collator=job.collator(),
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # the loss is a sum over the tokens of all passes of a step
        for one in list(self.callback_handler.callbacks):
            if type(one).__name__ == "PrinterCallback":
                self.remove_callback(one)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochShuffler:
        return self.sampler

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.job.folder.partial)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.metrics_file.add_batch(int((inputs["input_ids"] != self.job.pad).sum()) * self.args.world_size)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean over all validation tokens, not over batches."""
        started = time.monotonic()
        part = (self.args.process_index, self.args.world_size)
        sums = torch.tensor(validation_sums(self.model_wrapped, self.job, part), dtype=torch.float64)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        loss = float(sums[0] / sums[1])
        self.timing.judge(loss, self.state)
        step = self.state.global_step
        self.metrics_file.note({"step": step, "epoch": step / self.job.schedule.per_epoch, "eval_loss": loss})
        self.log({"eval_loss": loss})
        self.metrics_file.excluded_time(time.monotonic() - started)
        return {"eval_loss": loss}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers does it, but into a folder of another name, which is given its own when it is whole."""
        started = time.monotonic()
        folder, step = self.job.folder, self.state.global_step
        if self.job.is_main:
            shutil.rmtree(folder.partial, ignore_errors=True)
            folder.partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.job.is_main:
            folder.commit_checkpoint(folder.partial / f"checkpoint-{step}", step)
            shutil.rmtree(folder.partial)
            folder.drop_old(self.job.settings.save.keep, self.state.best_global_step)
        self.accelerator.wait_for_everyone()
        self.metrics_file.excluded_time(time.monotonic() - started)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save and output_dir:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_model(self.job, Path(output_dir), self.accelerator.unwrap_model(self.model))

    def save_state(self) -> None:
        """A checkpoint of the last whole step."""
        if self.state.global_step and self.state.global_step not in self.job.folder.steps():
            self._save_checkpoint(self.job.model, None)


class _TrainerCallback(TrainerCallback):
    """When to validate, to write a checkpoint and to stop; passes each step's numbers on."""

    def __init__(self, run: _Trainer, stop: StopSignal, early: EarlyStopSettings | None) -> None:
        self._run, self._stop, self._early = run, stop, early
        self._losses = run.job.folder.metric_values("eval_loss")
        self.ended_early = False

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._run.sampler.set_epoch(state.global_step // self._run.job.schedule.per_epoch)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        schedule, step = self._run.job.schedule, state.global_step
        last = step >= state.max_steps
        within = step % schedule.per_epoch or schedule.per_epoch
        control.should_log = True
        if self._run.job.validation is not None:
            control.should_evaluate = last or within % schedule.evaluate == 0
        control.should_save = last or within % schedule.save == 0
        if self._stop.requested:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log = control.should_evaluate = control.should_save = False  # the last step did it all

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs = given["logs"]
        if "loss" in logs:
            norm = logs.get("grad_norm")
            self._run.metrics_file.step(state.global_step, logs["loss"], logs["learning_rate"], norm)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ended_early:
            control.should_save = control.should_training_stop = True

    def judge(self, loss: float, state: TrainerState) -> None:
        """Whether a validation loss is the best one yet, and whether there were too many that were not."""
        self._losses.append(loss)
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step
            self._run.control.should_save = True
        if self._early and evaluations_without_gain(self._losses, self._early.threshold) >= self._early.patience:
            self.ended_early = self._run.control.should_training_stop = self._run.control.should_save = True


def evaluations_without_gain(losses: Sequence[float], threshold: float) -> int:
    """How many of the last losses in a row are not lower than the best before by more than `threshold`."""
    best, since = float("inf"), 0
    for loss in losses:
        since = 0 if loss < best - threshold else since + 1
        best = min(best, loss)
    return since
