"""A plan -> a job: the base is loaded, its loss and adapter installed, rows put into sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from mergeforge.hub.download import fetch
from mergeforge.train.distributed import is_main
from mergeforge.train.loop import chunked_loss, collate, load_base, lora
from mergeforge.train.loop.context import MetricCallback, TrainingContext
from mergeforge.train.plan import TrainPlan
from mergeforge.train.tokenizer_files import write_tokenizer_files

SMALL = 20_000_000  # parameters below which one thread beats several: 0.1 s a step instead of 0.3 to 1.0 s on two cores
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_32bit": "adamw_torch"}  # the others are called as transformers calls them


def make_context(plan: TrainPlan, listeners: Sequence[MetricCallback] = ()) -> tuple[TrainingContext, list[str]]:
    """Everything that a loop takes, and notes on what this model cannot do."""
    settings, way = plan.settings, plan.resolved.setup
    set_seed(settings.seed)
    if plan.resolved.device == "cpu" and plan.stats.parameters < SMALL:
        torch.set_num_threads(1)
    base = _load(plan)
    packed = plan.resolved.pack and collate.separates_packed_rows(base)
    note = chunked_loss.install_chunked_loss(base, chunk=way.ce_chunk, custom=chunked_loss.custom_loss(settings.loss))
    if way.checkpointing:
        load_base.checkpoint_activations(base, offload=way.offload)
    model: Any = base
    if settings.trains_adapter:
        model = lora.with_adapter(base, way.lora, plan.new_tokens)
        model.peft_config["default"].base_model_name_or_path = named(plan.base)
        model.peft_config["default"].revision = plan.revision
    packs, validation = plan.packs(packed=packed), plan.data.validation
    job = TrainingContext(
        settings=settings,
        model=model,
        train=collate.PackedSequences(plan.data.train, packs),
        validation=collate.PackedSequences(validation, plan.validation_packs(packed=packed)) if validation else None,
        schedule=plan.schedule(len(packs)),
        folder=plan.folder,
        lr=plan.resolved.lr,
        optimizer=_optimizer(way.optimizer, plan.resolved.device),
        dtype=plan.resolved.dtype,
        device=plan.resolved.device,
        pad=_pad(plan.tokenizer),
        write_tokenizer_files=lambda into: _tokenizer_files(plan, into),
        callbacks=list(listeners),
        is_main=is_main(),
    )
    apart = "this model does not keep packed rows apart: each row has a sequence of its own"
    return job, [one for one in (apart if plan.resolved.pack and not packed else "", note) if one]


def named(base: str) -> str:
    """A base as adapters and recipes name it: a Hub id, or an absolute path."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def _load(plan: TrainPlan) -> Any:
    """The base on its device, with rows for the tokens that were added."""
    settings = plan.settings
    folder = fetch(plan.base, plan.revision, ("model",)).path
    how = load_base.LoadOptions(
        str(folder),
        plan.resolved.dtype,
        plan.resolved.device,
        quantize=settings.method == "qlora",
        train_all=settings.method == "full",
        attention=settings.attention,
        embed_on_cpu=plan.resolved.setup.embed_on_cpu,
    )
    model = load_base.load_base(how)
    load_base.resize_embeddings(model, len(plan.tokenizer))
    return model


def _optimizer(name: str, device: str) -> str:
    """An optimizer as transformers calls it; only a card has pages to move."""
    name = name if device.startswith("cuda") else name.removeprefix("paged_")
    return OPTIMIZERS.get(name, name)


def _pad(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def _tokenizer_files(plan: TrainPlan, into: Path) -> None:
    template = None if plan.template_is_own else plan.data.template
    write_tokenizer_files(into, plan.is_generated, plan.tokenizer, changed=bool(plan.new_tokens), template=template)
