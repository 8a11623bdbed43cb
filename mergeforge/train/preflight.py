"""What a run would fail on later, found by its plan: before data is tokenized or weights are loaded."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.checkpoints.rope import RopeScaling
from mergeforge.core.sizes import format_size
from mergeforge.errors import (
    BudgetError,
    MissingExtraError,
    RecipeError,
    SourceError,
    did_you_mean,
    format_list,
    pip_install,
)
from mergeforge.gguf.architectures import ARCHITECTURES, class_name
from mergeforge.gguf.file_types import file_type_named
from mergeforge.recipe.model import OUT_DTYPES
from mergeforge.train.adapter_kinds import READ_WEIGHTS
from mergeforge.train.auto_config import Machine
from mergeforge.train.environment import silence_libraries
from mergeforge.train.estimate import STATE_NBYTES
from mergeforge.train.fused_experts import expert_names
from mergeforge.train.low_rank import LOW_RANK_OPTIMIZERS
from mergeforge.train.model_stats import ModelStats, stats_of
from mergeforge.train.objectives import KTO, SFT
from mergeforge.train.settings import DATA_INITS, LoraOptions, PostTraining, TrainSettings
from mergeforge.train.untargeted import linear_names

READ_AHEAD = ("paligemma",)  # model types whose prompt is one block without a causal mask
COMPLETE = 0.999  # of the model's weights must be in its files; tensors that are missing beyond that show at loading
UNPAGED = {"paged_adamw_8bit": 2.0, "paged_adamw_32bit": 8.0, "paged_lion_8bit": 1.0}  # bytes in a checkpoint


def check_device(settings: TrainSettings, machine: Machine) -> None:
    """Raise RecipeError or MissingExtraError for settings that this device or installation cannot run."""
    if settings.memory.offload_activations and not machine.on_gpu:
        text = f"memory.offload_activations is for GPUs, but the device is {machine.device}"
        raise RecipeError(text, hint="remove offload_activations, or train on a GPU")
    if settings.attention != "flash_attention_2":
        return
    if not machine.on_gpu or machine.dtype == "fp32":
        text = f"attention: flash_attention_2 needs a GPU and 16 bit, not {machine.device} in {machine.dtype}"
        raise RecipeError(text, hint="set attention: sdpa")
    if importlib.util.find_spec("flash_attn") is None:
        text = "attention: flash_attention_2 needs the package flash-attn"
        raise MissingExtraError(text, hint=f"{pip_install('flash-attn')}, or set attention: sdpa")


def check_base(folder: Path, settings: TrainSettings, stats: ModelStats) -> None:
    """Read the headers of a base's weights, if they are on this machine.

    Raises SourceError for weights that are quantized, pickled, truncated, or of another model than config.json.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config")
    method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else None
    if method and (method != "bitsandbytes" or settings.method != "qlora"):
        hint = "train the model that it was quantized from; bitsandbytes 4-bit models work with method: qlora"
        raise SourceError(f"{folder} is quantized ({method})", hint=hint)
    if method:
        return
    tensors = open_checkpoint(folder, str(folder), dequantize=False).tensors
    numel = sum(tensor.info.numel for tensor in tensors.values())
    if numel < COMPLETE * stats.parameters:
        text = f"{folder} holds {numel:,} weights, but a model of its config.json has {stats.parameters:,}"
        raise SourceError(text, hint="download it again")


def check_optimizer(model: Any, settings: TrainSettings) -> None:
    """Raise RecipeError for a low-rank optimizer of a model without the linear modules that it takes."""
    from torch import nn

    modules = dict(model.named_modules())
    if settings.optimizer in LOW_RANK_OPTIMIZERS and not any(
        isinstance(modules[name], nn.Linear) for name in linear_names(model)
    ):
        text = f"optimizer: {settings.optimizer} takes torch's Linear modules, and this model has none"
        raise RecipeError(text, hint="set optimizer: adamw_8bit or adafactor")


def rope_scaling(settings: TrainSettings, stats: ModelStats) -> RopeScaling | None:
    """The scaling of the positions that the settings ask for. Raises RecipeError where the model cannot have it."""
    asked, positions = settings.rope_scaling, stats.max_positions
    if asked is None:
        return None
    if not stats.rope:
        text = "rope_scaling: this model has no rotary positions that can be scaled"
        raise RecipeError(text, hint=f"remove it, and set seq_len: {positions} or less")
    if stats.rope != "default":
        text = f"rope_scaling: the positions of this model are scaled already ({stats.rope})"
        raise RecipeError(text, hint=f"remove it; the model has {positions} positions")
    if asked.factor is None and settings.seq_len is None:
        raise RecipeError("rope_scaling needs a factor or seq_len", hint="set rope_scaling: {type: yarn, factor: 2}")
    factor = asked.factor or math.ceil(max((settings.seq_len or 1) / positions, 1))
    if factor <= 1:
        text = f"rope_scaling: the model has {positions} positions, which is enough for seq_len: {settings.seq_len}"
        raise RecipeError(text, hint="remove it, or set a factor above 1")
    return RopeScaling(asked.type, factor)


def check_causal(model: Any, folder: str) -> None:
    """Raise SourceError for a model whose tokens attend to later ones; weights show it too (collate.reads_ahead)."""
    text = model.config.get_text_config()
    if model.config.model_type in READ_AHEAD or getattr(text, "use_bidirectional_attention", None) is True:
        raise reads_ahead_error(folder)


def reads_ahead_error(folder: str) -> SourceError:
    """The error for a model whose training loss would fall although it learns nothing but to copy."""
    text = f"{folder} cannot be trained on text: its tokens attend to later ones"
    return SourceError(text, hint="choose a model that predicts the next token from those before it")


def check_adapter(model: Any, settings: TrainSettings, new_tokens: tuple[int, ...], vocabulary: int) -> int:
    """Add the adapter to a model without weights; returns the number of weights that are trained.

    Raises RecipeError for layers, targets, patterns or modules that the model does not have, and for what PEFT refuses.
    """
    from mergeforge.train.loop import load_base, lora

    if not settings.trains_adapter:
        return sum(parameter.numel() for parameter in model.parameters())
    options, key = settings.lora, "adapter" if settings.adapter else "lora"
    _check_layers(key, options, model.config.get_text_config())
    _check_names(key, options, model)
    if new_tokens:
        _check_head_rows(model)
    load_base.resize_embeddings(model, vocabulary)
    model.requires_grad_(False)
    if settings.adapter and settings.adapter.type in READ_WEIGHTS:
        return stats_of(model).adapter_parameters(options)  # about as many as a LoRA has
    with silence_libraries():
        adapted = lora.with_adapter(
            model, replace(options, init="default"), new_tokens, settings.adapter, without_weights=True
        )
    if options.init == "loftq" and any(type(module).__name__ == "Conv1D" for module in model.modules()):
        text = "lora.init: loftq folds into the 4-bit base, which cannot be made again from this model's files"
        raise RecipeError(text, hint="set init: default")
    if options.init in DATA_INITS and getattr(adapted.peft_config["default"], "target_parameters", None):
        text = f"lora.init: {options.init} does not work on experts that are fused into one tensor"
        raise RecipeError(text, hint="name lora.targets without the experts, such as [q_proj, v_proj]")
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _check_head_rows(model: Any) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is not None and len(head.weight) != len(embedding):
        text = f"tokens.add: the head has {len(head.weight)} rows and the embedding {len(embedding)}"
        raise RecipeError(f"{text}, so new tokens have no row of their own", hint="use tokens that the model has")


def _check_layers(key: str, options: LoraOptions, config: Any) -> None:
    count = int(getattr(config, "num_hidden_layers", 0))
    if missing := [layer for layer in options.layers if layer >= count]:
        text = f"{key}.layers: the model has no layer {format_list(map(str, missing))}"
        raise RecipeError(text, hint=f"its {count} layers are 0 to {count - 1}")


def _check_names(key: str, options: LoraOptions, model: Any) -> None:
    """Refuse names of modules and patterns that match nothing, which PEFT ignores while others match."""
    modules = [name for name, _ in model.named_modules() if name]
    targets = options.targets if isinstance(options.targets, tuple) else ()
    known = [*modules, *(name for name, _ in model.named_parameters()), *expert_names(model)]
    for name, names in (("targets", targets), ("modules_to_save", options.modules_to_save)):
        for module in names:
            if not any(path == module or path.endswith(f".{module}") for path in known):
                raise _no_module(f"{key}.{name}", module, linear_names(model) if name == "targets" else modules)
    for name, patterns in (("rank_pattern", options.rank_pattern), ("alpha_pattern", options.alpha_pattern)):
        for pattern in patterns:
            if not any(_matches(pattern, path) for path in known):
                raise _no_module(f"{key}.{name}", pattern, linear_names(model))


def _matches(pattern: str, path: str) -> bool:
    """Whether PEFT takes a key of rank_pattern for this module."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise RecipeError(f"lora: {pattern!r} is not a regular expression: {error}") from None


def _no_module(key: str, name: str, paths: Iterable[str]) -> RecipeError:
    names = sorted({path.rpartition(".")[2] for path in paths} - {""})
    known = [known for known in names if not known.isdecimal()]
    hint = did_you_mean(name, known) or f"the model's modules: {format_list(known, 12)}"
    return RecipeError(f"{key}: the model has no module {name!r}", hint=hint)


def check_loss(dotted: str, vocabulary: int) -> None:
    """Call a custom loss function once on four rows of random logits.

    Raises RecipeError unless it returns one finite number that depends on the logits.
    """
    import torch

    from mergeforge.train.loop.chunked_loss import custom_loss

    function = custom_loss(dotted)
    assert function is not None
    hint = "write it as loss(logits, labels, count) -> the sum over the rows, divided by count"
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0), requires_grad=True)
    try:
        loss: Any = function(logits, torch.arange(4) % vocabulary, 4)
    except torch.OutOfMemoryError:
        return  # the run halves its batch, or says so
    except Exception as error:  # whatever the user's function raises
        raise RecipeError(f"loss: {dotted} fails: {type(error).__name__}: {error}", hint=hint) from error
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        text = f"loss: {dotted} returns {kind}, not a number that depends on the logits"
        raise RecipeError(text, hint=hint)
    if not torch.isfinite(loss):
        raise RecipeError(f"loss: {dotted} returns {loss.item()} for random logits", hint=hint)


def check_weights(settings: TrainSettings, weights: tuple[float, float]) -> None:
    """Raise RecipeError where the weights of rows have no effect. `weights`: the smallest and the largest."""
    if weights[0] == weights[1]:
        return
    text, hint = "", "remove the column 'weight' from the data"
    if settings.objective != SFT:
        text = f"objective: {settings.objective} cannot weight rows"
        hint += ", or set preference.desirable_weight" if settings.objective == KTO else ""
    elif settings.loss:
        text = f"loss: {settings.loss} does not take the weights of rows"
    elif settings.batch_size == 1:
        text = "weights compare the rows of a step, but with batch.size: 1 a step has one row"
        hint = "set batch: {size: 8} or more"
    if text:
        raise RecipeError(f"{text}, and those of the data are {weights[0]:g} to {weights[1]:g}", hint=hint)


def check_post_training(after: PostTraining, config_folder: Path, *, trains_adapter: bool) -> None:
    """Raise RecipeError for GGUF types and steps that there are not, SourceError for models without a GGUF form."""
    if after.merge and not trains_adapter:
        raise RecipeError("full training makes a whole model: there is nothing to merge", hint="remove 'merge'")
    if after.merge and after.merge.dtype and after.merge.dtype not in OUT_DTYPES:
        hint = did_you_mean(after.merge.dtype, OUT_DTYPES) or f"one of {', '.join(OUT_DTYPES)}"
        raise RecipeError(f"after.merge.dtype: there is no dtype {after.merge.dtype!r}", hint=hint)
    for name in after.gguf:
        file_type_named(name)
    config = json.loads((config_folder / "config.json").read_text(encoding="utf-8"))
    if after.gguf and config.get("architectures") and class_name(config) not in ARCHITECTURES:
        text = f"after.gguf: the architecture {class_name(config)} is not supported in GGUF"
        raise SourceError(text, hint="`mergeforge list architectures` lists the supported ones; remove 'gguf'")


def check_disk(settings: TrainSettings, trained: int) -> None:
    """Raise BudgetError if the checkpoints and the result do not fit the disk of the run's folder."""
    optimizer = settings.optimizer or "adamw"
    state = UNPAGED.get(optimizer, STATE_NBYTES[optimizer])
    checkpoints = (
        settings.save.keep + 1 + (1 if settings.data.validation else 0)
    )  # the kept, the one being written, the best
    nbytes = int(trained * (4 + state)) * checkpoints + trained * 4
    folder = settings.output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        text = f"{checkpoints} checkpoints and the result need about {format_size(nbytes)}"
        text += f", but {folder} has {format_size(free)}"
        raise BudgetError(text, hint="set save: {keep: 1}, or choose an output on another disk")
