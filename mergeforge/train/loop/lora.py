"""The adapter to train: which modules get one, with which settings, and which token rows are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from mergeforge.errors import RecipeError, format_list
from mergeforge.train.adapter_kinds import ADAPTER_KINDS, AdapterOptions
from mergeforge.train.model_stats import modules_without_adapter
from mergeforge.train.settings import LoraOptions

ALL = "all-linear"
LINEAR_CLASSES = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
INITS: dict[str, Any] = {"default": True}  # PEFT's init_lora_weights, where it differs from our name


def with_adapter(
    model: PreTrainedModel, lora: LoraOptions, new_tokens: Sequence[int], adapter: AdapterOptions | None = None
) -> PeftModel:
    """The model with a LoRA adapter; the embedding and lm_head rows of `new_tokens` (ids) are trained too.

    `adapter`: another kind of adapter, with targets and layers of `lora`.
    Adapters are float32 whatever the base is. Raises RecipeError where no module matches `targets`.
    """
    try:
        config = adapter_config(model, adapter, lora) if adapter else lora_config(model, lora, new_tokens)
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, AssertionError) as error:
        names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
        hint = f"the model's linear modules: {format_list(names, 12)}"
        raise RecipeError(f"the adapter does not fit the model: {str(error).splitlines()[0]}", hint=hint) from None
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return adapted


def adapter_config(model: PreTrainedModel, adapter: AdapterOptions, lora: LoraOptions) -> PeftConfig:
    """PEFT's configuration of another kind of adapter."""
    targets: Any = list(lora.targets) if isinstance(lora.targets, tuple) else lora.targets or ALL
    if targets == ALL:
        excluded = modules_without_adapter(model.config.model_type) | _linear_subclasses(model)
        targets = sorted(linear_names(model) - excluded)
    config: Any = getattr(peft, ADAPTER_KINDS[adapter.type])
    fields = {field.name for field in dataclasses.fields(config)}
    values: dict[str, Any] = {"target_modules": targets, "task_type": "CAUSAL_LM"} | dict(adapter.options)
    if lora.layers:
        values["layers_to_transform"] = list(lora.layers)
    if "fan_in_fan_out" in fields:
        values["fan_in_fan_out"] = any(type(module).__name__ == "Conv1D" for module in model.modules())
    if adapter.type == "ia3":  # IA3 scales the inputs of these modules, and the outputs of all others
        values.setdefault("feedforward_modules", [])
    made: PeftConfig = config(**values)
    return made


def lora_config(model: PreTrainedModel, lora: LoraOptions, new_tokens: Sequence[int]) -> LoraConfig:
    """PEFT's configuration for the settings."""
    rank = lora.r or 16
    targets: Any = list(lora.targets) if isinstance(lora.targets, tuple) else lora.targets or ALL
    excluded = modules_without_adapter(model.config.model_type) if lora.targets is None else set()
    if targets == ALL and (lora.layers or excluded):  # PEFT takes layers only together with module names
        targets = sorted(linear_names(model) - excluded)
    return LoraConfig(
        r=rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * rank,  # type: ignore[arg-type]  # PEFT takes floats
        lora_dropout=lora.dropout,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        target_modules=targets,
        exclude_modules=sorted(_linear_subclasses(model)) or None if targets == ALL else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=INITS.get(lora.init, lora.init),
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        layers_to_transform=list(lora.layers) or None,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=_token_rows(model, new_tokens) if new_tokens else None,
        task_type="CAUSAL_LM",
    )


def linear_names(model: PreTrainedModel) -> set[str]:
    """The last names of all linear modules but the head: what `all-linear` means."""
    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module) and module is not head
    }


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in LINEAR_CLASSES


def _linear_subclasses(model: PreTrainedModel) -> set[str]:
    """Last names of modules that inherit from nn.Linear but do something else (PhiMoE's router returns a tuple)."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _is_linear(module)
    }


def _token_rows(model: PreTrainedModel, new_tokens: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's trainable_token_indices: rows of the embedding, and of lm_head where that is a tensor of its own.

    With the embedding's rows alone, an untied lm_head keeps arbitrary rows, and the model never generates the tokens.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)].rpartition(".")[2]: list(new_tokens) for layer in layers}
