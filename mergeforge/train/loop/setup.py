"""TrainPlan -> TrainingContext: loads the base, installs loss and adapter, packs the rows, probes the memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from mergeforge.data.chat_templates import Template
from mergeforge.data.template_probe import turn_ending
from mergeforge.hub.download import fetch
from mergeforge.train import preflight
from mergeforge.train.environment import is_main
from mergeforge.train.loop import (
    chunked_loss,
    collate,
    eva,
    load_base,
    loftq,
    log_probs,
    lora,
    lora_forward,
    noise,
    preference,
)
from mergeforge.train.loop.context import MetricCallback, TrainingContext, autocast, memory_used
from mergeforge.train.loop.preference_batch import AnswerTokens, PreferenceSequences
from mergeforge.train.objectives import OBJECTIVES
from mergeforge.train.plan import CONFIG, TrainPlan
from mergeforge.train.tokenizer_files import write_tokenizer_files

SMALL = 20_000_000  # parameters below which one thread is faster: 0.1 s a step instead of 0.3 to 1.0 s on two cores
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_32bit": "adamw_torch"}  # transformers' names, where they differ from ours


def make_context(plan: TrainPlan, callbacks: Sequence[MetricCallback] = ()) -> tuple[TrainingContext, list[str]]:
    """Everything that a loop needs, and notes on what this model cannot do."""
    settings, setup = plan.settings, plan.resolved.setup
    set_seed(settings.seed)
    if plan.resolved.device == "cpu" and plan.stats.parameters < SMALL:
        torch.set_num_threads(1)
    base = _load(plan)
    if collate.reads_ahead(base):
        raise preflight.reads_ahead_error(plan.base)
    packed = plan.resolved.pack and collate.separates_packed_rows(base)
    loss_note = _install_loss(plan, base)
    if setup.checkpointing:
        load_base.checkpoint_activations(base, offload=setup.offload)
    model = _with_adapter(plan, base) if settings.trains_adapter else base
    if settings.neftune:
        noise.add_embedding_noise(base, settings.neftune)
    context = _context(plan, model, callbacks, packed=packed)
    _initialize_adapter(plan, context)
    unpacked = "this model cannot keep packed rows apart: each row gets a sequence of its own"
    notes = [unpacked if plan.resolved.pack and not packed else "", loss_note]
    return context, [note for note in notes if note]


def _install_loss(plan: TrainPlan, base: Any) -> str:
    """Let the base compute the loss of the run's objective; returns a note, or ""."""
    chunk = plan.resolved.setup.ce_chunk
    if OBJECTIVES[plan.settings.objective].is_preference:
        preference.disable_dropout(base)
        return log_probs.install_log_probs(base, chunk=chunk)
    return chunked_loss.install_chunked_loss(base, chunk=chunk, custom=chunked_loss.custom_loss(plan.settings.loss))


def _with_adapter(plan: TrainPlan, base: Any) -> Any:
    """The base with a new adapter, whose configuration names the base."""
    model: Any = lora.with_adapter(base, plan.resolved.setup.lora, plan.new_tokens, plan.settings.adapter)
    lora_forward.add_in_place(model)
    model.peft_config["default"].base_model_name_or_path = _base_name(plan.base)
    model.peft_config["default"].revision = plan.revision
    return model


def _context(plan: TrainPlan, model: Any, callbacks: Sequence[MetricCallback], *, packed: bool) -> TrainingContext:
    settings, resolved, validation = plan.settings, plan.resolved, plan.data.validation
    packs, pad, objective = plan.packs(packed=packed), _pad_token(plan.tokenizer), OBJECTIVES[settings.objective]
    sequences: Any = PreferenceSequences if objective.is_preference else collate.PackedSequences
    training = preference.PreferenceTraining(objective, settings.preference, packed, pad)
    return TrainingContext(
        settings=settings,
        model=model,
        train=sequences(plan.data.train, packs),
        validation=sequences(validation, plan.validation_packs(packed=packed)) if validation else None,
        schedule=plan.schedule(len(packs)),
        folder=plan.folder,
        lr=resolved.lr,
        optimizer=_optimizer(resolved.setup.optimizer, resolved.device),
        dtype=resolved.dtype,
        device=resolved.device,
        pad=pad,
        weighted=not objective.is_preference and plan.weighted,
        write_files=lambda folder: _write_files(plan, folder),
        callbacks=list(callbacks),
        is_main=is_main(),
        preference=training if objective.is_preference else None,
    )


def _initialize_adapter(plan: TrainPlan, context: TrainingContext) -> None:
    """Set the adapter's weights where that needs the training data or the base's own weights."""
    lora_options = plan.resolved.setup.lora
    if lora_options.init == "eva":
        key = f"{plan.settings.fingerprint} {plan.data.fingerprint} {lora_options.r}"
        eva.initialize_eva(context, plan.folder.eva, key)
    elif lora_options.init == "loftq":
        loftq.initialize_loftq(context.model, fetch(plan.base, plan.revision, ("model",)).path)


def _base_name(base: str) -> str:
    """The base as adapter_config.json names it: a Hub id, or an absolute path."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def _load(plan: TrainPlan) -> Any:
    """The base on its device, with embedding rows for the added tokens."""
    settings = plan.settings
    options = load_base.LoadOptions(
        str(fetch(plan.base, plan.revision, ("model",)).path),
        plan.resolved.dtype,
        plan.resolved.device,
        quantize=settings.method == "qlora",
        train_all=settings.method == "full",
        attention=settings.attention,
        embed_on_cpu=plan.resolved.setup.embed_on_cpu,
        config=plan.scaled_config,
    )
    model = load_base.load_base(options)
    load_base.resize_embeddings(model, len(plan.tokenizer))
    return model


def _optimizer(name: str, device: str) -> str:
    """transformers' name of an optimizer. Paged ones exist on GPUs only."""
    name = name if device.startswith("cuda") else name.removeprefix("paged_")
    return OPTIMIZERS.get(name, name)


def _pad_token(tokenizer: Any) -> int:
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(token or 0)


def _write_files(plan: TrainPlan, folder: Path) -> None:
    """Tokenizer and chat template; beside an adapter, also the config.json of a base with scaled positions."""
    if plan.scaled_config and plan.settings.trains_adapter:
        (folder / CONFIG).write_text(json.dumps(plan.scaled_config, indent=2) + "\n", encoding="utf-8")
    template = None if plan.uses_base_template else plan.data.template
    options = {"template": template, "eos": _end_of_turn(plan.tokenizer, template) if template else None}
    write_tokenizer_files(folder, plan.config_folder, plan.tokenizer, changed=bool(plan.new_tokens), **options)


def _end_of_turn(tokenizer: Any, template: str) -> str | None:
    """The special token that ends answers in this template, unless it is the tokenizer's EOS."""
    ids = turn_ending(Template(template, "of the data"), tokenizer).ids
    return str(tokenizer.convert_ids_to_tokens(ids[0])) if ids and ids[0] != tokenizer.eos_token_id else None


def probe_memory(context: TrainingContext, seq_len: int) -> int:
    """Run forward and backward of a full batch of `seq_len` tokens, all with a label; returns the peak in bytes.

    Run before training, so that memory runs out at once or not at all. Leaves no gradient and no random number drawn.
    Raises torch.OutOfMemoryError.
    """
    batch = {name: tensor.to(context.device) for name, tensor in _full_batch(context, seq_len).items()}
    cpu_state = torch.random.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    if context.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(context.device)
    try:
        with autocast(context):
            loss = context.loss(context.model, batch, context.loss_count(batch), preference.RewardSums())
        loss.backward()
        return memory_used(context.device)
    finally:
        context.model.zero_grad(set_to_none=True)
        torch.random.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def _full_batch(context: TrainingContext, seq_len: int) -> dict[str, Tensor]:
    """A batch of the longest sequences, in which every token has a label."""
    size = context.schedule.micro_batch
    vocabulary = int(context.base_model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(size * seq_len).view(size, seq_len) % vocabulary
    objective = context.preference
    if objective is None:
        return collate.collate([[collate.Row(row, row)] for row in tokens], pad=context.pad)
    answers = objective.objective.answers
    length = seq_len // answers if objective.packed else seq_len
    kinds = [1 - 2 * (number % 2) for number in range(answers)]
    return objective.collate([[AnswerTokens(row[:length], row[:length], kind) for kind in kinds] for row in tokens])
