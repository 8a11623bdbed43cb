"""Job: all that a loop needs to train; and what both loops share: optimizer, validation, metrics."""

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
from mergeforge.train.loop.collate import PackedSequences, collate
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.schedule import Schedule
from mergeforge.train.settings import TrainSettings

Batch = dict[str, Tensor]


class MetricCallback(Protocol):
    """Is told every line of metrics as it is written."""

    def __call__(self, line: Mapping[str, Any]) -> None: ...


@dataclass
class TrainingContext:
    """A run that is decided: nothing in it is `auto` any more."""

    settings: TrainSettings
    model: Any  # PreTrainedModel or PeftModel
    train: PackedSequences
    validation: PackedSequences | None
    schedule: Schedule
    folder: RunFolder
    lr: float
    optimizer: str  # by transformers' name
    dtype: str
    device: str
    pad: int
    write_tokenizer_files: Callable[[Path], None]  # tokenizer and chat template into a folder
    callbacks: list[MetricCallback] = field(default_factory=list)
    is_main: bool = True  # of several processes, the one that writes

    @property
    def inner(self) -> Any:
        """The transformers model inside the adapter."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def report(self, line: Mapping[str, Any]) -> None:
        """Tell the listeners."""
        for listener in self.callbacks:
            listener(line)

    def collator(self) -> Callable[..., Batch]:
        return partial(collate, pad=self.pad)


class MetricLogger:
    """metrics.jsonl: step, loss, lr, gradient norm, tokens a second, memory; told to the listeners too."""

    def __init__(self, job: TrainingContext) -> None:
        self._job = job
        self._tokens = 0
        self._last = time.monotonic()
        self._aside = 0.0

    def add_batch(self, tokens: int) -> None:
        """Count tokens that went through the model."""
        self._tokens += tokens

    def excluded_time(self, seconds: float) -> None:
        """Time that was not training: validation, checkpoints."""
        self._aside += seconds

    def step(self, step: int, loss: float, lr: float, norm: float | None) -> None:
        """Note one optimiser step. Raises MergeforgeError for a loss that is no number."""
        if not math.isfinite(loss):
            hint = "a lower lr, dtype: bf16 instead of fp16, or look at the rows of this step"
            raise MergeforgeError(f"the loss of step {step} is {loss}", hint=hint)
        now = time.monotonic()
        seconds = max(now - self._last - self._aside, 1e-9)
        line = {"step": step, "epoch": step / self._job.schedule.per_epoch, "loss": loss, "lr": lr}
        line |= {} if norm is None else {"grad_norm": norm}
        self.note(line | {"tokens_per_second": self._tokens / seconds, "memory": memory_used(self._job.device)})
        self._tokens, self._last, self._aside = 0, now, 0.0

    def note(self, line: Mapping[str, Any]) -> None:
        """Write a line as it is."""
        if not self._job.is_main:
            return
        with open(self._job.folder.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._job.report(line)


def memory_used(device: str) -> int:
    """Bytes: the card's peak, or this process's memory."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident_memory()


def validation_sums(model: nn.Module, job: TrainingContext, part: tuple[int, int] = (0, 1)) -> tuple[float, int]:
    """The sum of the losses of all validation tokens, and their number; `part` (i, n): of every n-th batch from i.

    Changes nothing that training depends on: no random number is drawn, and the mode is put back.
    """
    assert job.validation is not None
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), autocast(job):
        for at in range(part[0] * job.schedule.micro_batch, len(job.validation), part[1] * job.schedule.micro_batch):
            rows = [job.validation[one] for one in range(at, min(at + job.schedule.micro_batch, len(job.validation)))]
            batch = {name: value.to(job.device) for name, value in job.collator()(rows).items()}
            total += float(model(**batch, num_items_in_batch=1)["loss"])
            count += int((batch["labels"] != IGNORE_INDEX).sum())
    model.train(training)
    return total, count


def autocast(job: TrainingContext) -> Any:
    """The precision in which transformers' Trainer computes with bf16 or fp16."""
    kind = torch.device(job.device).type
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.dtype)
    return torch.autocast(kind, dtype=wanted or torch.bfloat16, enabled=wanted is not None)


def save_model(job: TrainingContext, folder: Path, model: Any = None) -> None:
    """The adapter (or, fully trained, the model) with tokenizer and chat template."""
    model = model or job.model
    whole = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, **whole)
    job.write_tokenizer_files(folder)


def load_weights(job: TrainingContext, folder: Path) -> None:
    """Put a checkpoint's weights into the model."""
    if hasattr(job.model, "peft_config"):
        job.model.load_adapter(str(folder), "default", is_trainable=True)
        return
    from safetensors.torch import load_file

    weights = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    job.model.load_state_dict(weights, strict=False)  # tied weights are stored once
