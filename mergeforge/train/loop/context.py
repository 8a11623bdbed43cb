"""TrainingContext: everything that a loop needs; and what both loops share: metrics, validation, saving."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mergeforge.errors import MergeforgeError
from mergeforge.tensors.budget import resident_memory
from mergeforge.train.loop.chunked_loss import IGNORE_INDEX
from mergeforge.train.loop.collate import LOSS_WEIGHTS, PackedSequences, collate
from mergeforge.train.loop.preference import PreferenceTraining, RewardSums
from mergeforge.train.loop.preference_batch import PreferenceSequences
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.schedule import Schedule
from mergeforge.train.settings import TrainSettings

Batch = dict[str, Tensor]


class MetricCallback(Protocol):
    """Called with every line of metrics as it is written."""

    def __call__(self, line: Mapping[str, Any]) -> None: ...


@dataclass
class TrainingContext:
    """A run with every setting resolved and the model loaded."""

    settings: TrainSettings
    model: Any  # PreTrainedModel or PeftModel
    train: PackedSequences | PreferenceSequences
    validation: PackedSequences | PreferenceSequences | None
    schedule: Schedule
    folder: RunFolder
    lr: float
    optimizer: str  # transformers' name
    dtype: str
    device: str
    pad: int
    write_files: Callable[[Path], None]  # the files beside the weights: tokenizer, chat template
    callbacks: list[MetricCallback] = field(default_factory=list)
    is_main: bool = True  # of several processes, the one that writes files
    preference: PreferenceTraining | None = None  # None: supervised fine-tuning
    weighted: bool = False  # whether rows have different weights in the training loss

    @property
    def base_model(self) -> Any:
        """The transformers model inside the adapter."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def report(self, line: Mapping[str, Any]) -> None:
        """Pass a line of metrics to the callbacks."""
        for callback in self.callbacks:
            callback(line)

    def collator(self, *, weighted: bool = False) -> Callable[..., Batch]:
        return self.preference.collate if self.preference else partial(collate, pad=self.pad, weighted=weighted)

    def loss_count(self, batch: Batch) -> float:
        """What a step's loss is divided by: trained tokens, the sum of their weights, or rows with a preference.

        The weighted mean is that of torch.nn.CrossEntropyLoss with weights: only the weights' proportions matter.
        """
        if self.preference:
            return self.preference.count(batch)
        is_trained = batch["labels"] != IGNORE_INDEX
        if LOSS_WEIGHTS in batch:
            return float(batch[LOSS_WEIGHTS][is_trained].sum(dtype=torch.float64))
        return int(is_trained.sum())

    def loss(self, model: nn.Module, batch: Batch, count: Any, rewards: RewardSums) -> Tensor:
        """The summed loss of a batch, divided by `count`. `model`: perhaps wrapped for several devices."""
        if self.preference:
            loss: Tensor = self.preference.loss(model, self.model, batch, rewards) / count
        else:
            loss = model(**batch, num_items_in_batch=count)["loss"]
        return loss


class MetricLogger:
    """Writes metrics.jsonl: step, loss, lr, gradient norm, tokens per second, memory. Callbacks get each line too."""

    def __init__(self, context: TrainingContext) -> None:
        self._context = context
        self._tokens = 0
        self._last_step = time.monotonic()
        self._excluded_seconds = 0.0

    def add_batch(self, tokens: int) -> None:
        """Count tokens that went through the model."""
        self._tokens += tokens

    def exclude_time(self, seconds: float) -> None:
        """Leave time that was not training (validation, checkpoints) out of the speed."""
        self._excluded_seconds += seconds

    def step(
        self, step: int, loss: float, lr: float, norm: float | None, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write one optimizer step. Raises MergeforgeError for a loss that is infinite or NaN."""
        if not math.isfinite(loss):
            hint = "try a lower lr, or dtype: bf16 instead of fp16, or check the rows of this step"
            raise MergeforgeError(f"the loss of step {step} is {loss}", hint=hint)
        now = time.monotonic()
        seconds = max(now - self._last_step - self._excluded_seconds, 1e-9)
        line = {"step": step, "epoch": step / self._context.schedule.steps_per_epoch, "loss": loss, "lr": lr}
        line |= {} if norm is None else {"grad_norm": norm}
        line |= metrics or {}
        memory = memory_used(self._context.device)
        self.write(line | {"tokens_per_second": self._tokens / seconds, "memory": memory})
        self._tokens, self._last_step, self._excluded_seconds = 0, now, 0.0

    def validation(self, step: int, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Write the validation loss after a step."""
        line = {"step": step, "epoch": step / self._context.schedule.steps_per_epoch, "eval_loss": loss}
        self.write(line | dict(metrics or {}))

    def write(self, line: Mapping[str, Any]) -> None:
        """Write a line as it is."""
        if not self._context.is_main:
            return
        with open(self._context.folder.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._context.report(line)


def memory_used(device: str) -> int:
    """Bytes: the GPU's peak, or this process's resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident_memory()


def validation_sums(
    model: nn.Module, context: TrainingContext, part: tuple[int, int] = (0, 1), rewards: RewardSums | None = None
) -> tuple[float, int]:
    """The summed loss of all validation tokens (or preferences) and their number. Adds to `rewards`.

    Rows count alike, whatever their weights. `part` (i, n): only every n-th batch, from batch i.
    Changes nothing that training depends on: it draws no random number and restores the model's mode.
    """
    assert context.validation is not None
    sequences, size = context.validation, context.schedule.micro_batch
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), autocast(context):
        for start in range(part[0] * size, len(sequences), part[1] * size):
            rows = [sequences[index] for index in range(start, min(start + size, len(sequences)))]
            batch = {name: tensor.to(context.device) for name, tensor in context.collator()(rows).items()}
            total += float(context.loss(model, batch, 1, RewardSums() if rewards is None else rewards))
            count += int(context.loss_count(batch))
    model.train(training)
    return total, count


def autocast(context: TrainingContext) -> Any:
    """The autocast that transformers' Trainer uses for bf16 and fp16."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(context.dtype)
    device_type = torch.device(context.device).type
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def save_model(context: TrainingContext, folder: Path, model: Any = None) -> None:
    """Save the adapter (or, after full training, the model) with tokenizer and chat template."""
    model = model or context.model
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, **options)
    context.write_files(folder)


def load_weights(context: TrainingContext, folder: Path) -> None:
    """Load a checkpoint's weights into the model."""
    if hasattr(context.model, "peft_config"):
        context.model.load_adapter(str(folder), "default", is_trainable=True)
        return
    from safetensors.torch import load_file

    weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    context.model.load_state_dict(weights, strict=False)  # tied weights are stored once
