"""The optimizer and the learning rate schedule of a run, for both loops."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from mergeforge.train.low_rank import LOW_RANK_OPTIMIZERS
from mergeforge.train.schedule import Schedule
from mergeforge.train.settings import TrainSettings
from mergeforge.train.untargeted import linear_names

SCHEDULES = {  # transformers' names
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}


def schedule_arguments(settings: TrainSettings, schedule: Schedule) -> dict[str, Any]:
    """The schedule as TrainingArguments of transformers."""
    name, least = settings.schedule, settings.min_lr_ratio
    if name == "wsd":
        options = {"num_decay_steps": schedule.decay_steps, "min_lr_ratio": least}
        return {"lr_scheduler_type": SCHEDULES[name], "lr_scheduler_kwargs": options}
    if name == "cosine" and least:
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": least}}
    return {"lr_scheduler_type": SCHEDULES[name]}


def optimizer_arguments(name: str, model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer as TrainingArguments of transformers. `options`: of a low-rank optimizer."""
    if name not in LOW_RANK_OPTIMIZERS:
        return {"optim": name}
    targets = sorted({module.rpartition(".")[2] for module in linear_names(model)})
    text = ",".join(f"{option}={value}" for option, value in options.items())
    return {"optim": name, "optim_target_modules": targets, "optim_args": text or None}


@contextmanager
def loadable_state(name: str) -> Iterator[None]:
    """Let torch load checkpoints that hold an optimizer's own classes, which have tensors and numbers only."""
    low_rank = LOW_RANK_OPTIMIZERS.get(name)
    if low_rank is None:
        yield
        return
    with torch.serialization.safe_globals([_import(path) for path in low_rank.state_classes]):
        yield


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def make_rates(settings: TrainSettings, schedule: Schedule, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate schedule of an optimizer."""
    arguments = schedule_arguments(settings, schedule)
    name, options = arguments["lr_scheduler_type"], arguments.get("lr_scheduler_kwargs")
    return get_scheduler(
        name, optimizer, schedule.warmup_steps, schedule.total_steps, scheduler_specific_kwargs=options
    )


def make_optimizer(model: nn.Module, arguments: TrainingArguments, lr_ratio: float | None) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters. `lr_ratio`: B's learning rate divided by that of A (LoRA+)."""
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: list[dict[str, Any]] = options.pop("params", None) or [{"params": list(trained.values())}]
    if arguments.optim == "galore_adamw":
        options["no_deprecation_warning"] = True  # transformers' AdamW, which it copies, was deprecated
    if lr_ratio is not None:
        matrices = [parameter for name, parameter in trained.items() if _is_b(name)]
        others = [parameter for name, parameter in trained.items() if not _is_b(name)]
        groups = [{"params": others}, {"params": matrices, "lr": arguments.learning_rate * lr_ratio}]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options, weight_decay=arguments.weight_decay)
    return optimizer


def _is_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name
