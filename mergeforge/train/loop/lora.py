"""The adapter to train: which modules get one, with which settings, and which token rows are trained."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from mergeforge.errors import RecipeError, format_list
from mergeforge.train.adapter_kinds import ADAPTER_KINDS, NORMS, AdapterOptions
from mergeforge.train.model_stats import modules_without_adapter
from mergeforge.train.settings import LoraOptions
from mergeforge.train.untargeted import ROUTERS, linear_names, untargeted_parts, untargeted_pattern

ALL = "all-linear"
EXPECTED_WARNINGS = (  # of PEFT
    "lora with eva initialization used with low_cpu_mem_usage=False",  # rows of new tokens would get no memory
    "Failed to load the CUDA extension",  # BOFT's; torch computes the same
    "Setting boft_n_butterfly_factor to 1",  # as it is
    "Unsupported layer type",  # ln_tuning's norms
)
# PEFT's init_lora_weights, where it differs from our name; LoftQ changes A and B later (loftq.py)
INITS: dict[str, Any] = {"default": True, "loftq": True}


def with_adapter(
    model: PreTrainedModel,
    lora: LoraOptions,
    new_tokens: Sequence[int],
    adapter: AdapterOptions | None = None,
    *,
    without_weights: bool = False,
) -> PeftModel:
    """The model with a LoRA adapter; the embedding and lm_head rows of `new_tokens` (ids) are trained too.

    Adapters are float32 whatever the base is. `adapter`: another kind of adapter, with targets and layers of `lora`.
    `without_weights`: the model is on the meta device. Raises RecipeError where no module matches `targets`, and for
    what PEFT cannot do.
    """
    try:
        config = adapter_config(model, adapter, lora) if adapter else lora_config(model, lora, new_tokens)
        _check_experts(config, lora)
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            adapted = get_peft_model(model, config, low_cpu_mem_usage=without_weights)
    except (ValueError, TypeError, AssertionError, ArithmeticError) as error:
        names = sorted({name.rpartition(".")[2] for name in linear_names(model)})
        hint = f"the model's linear modules: {format_list(names, 12)}"
        raise RecipeError(f"the adapter does not fit the model: {str(error).splitlines()[0]}", hint=hint) from None
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return adapted


def _check_experts(config: PeftConfig, lora: LoraOptions) -> None:
    """Raise RecipeError for what PEFT cannot do on fused experts."""
    if isinstance(config, LoraConfig) and config.target_parameters and (lora.dora or lora.dropout):
        what = "DoRA" if lora.dora else "lora.dropout"
        hint = "set method: lora and no dropout, or name lora.targets without the experts, such as [q_proj, v_proj]"
        raise RecipeError(f"{what} does not work on experts that are fused into one tensor", hint=hint)


def adapter_config(model: PreTrainedModel, adapter: AdapterOptions, lora: LoraOptions) -> PeftConfig:
    """PEFT's configuration of another kind of adapter."""
    targets: Any = list(lora.targets) if isinstance(lora.targets, tuple) else lora.targets or ALL
    untargeted = untargeted_pattern(untargeted_parts(model), lora.targets)
    if targets == ALL:
        names = _norm_names(model) if adapter.type == NORMS else _last_names(model, untargeted)
        targets = sorted(names)
    elif adapter.type == NORMS:
        _check_norms(model, targets)
    config: Any = getattr(peft, ADAPTER_KINDS[adapter.type])
    fields = {field.name for field in dataclasses.fields(config)}
    values: dict[str, Any] = {"target_modules": targets, "task_type": "CAUSAL_LM"} | dict(adapter.options)
    if lora.layers:
        if "layers_to_transform" not in fields:
            raise RecipeError(f"adapter: {adapter.type} cannot be limited to layers", hint="remove 'layers'")
        values["layers_to_transform"] = list(lora.layers)
    if "exclude_modules" in fields:
        values["exclude_modules"] = untargeted or None
    if "fan_in_fan_out" in fields:
        values["fan_in_fan_out"] = any(type(module).__name__ == "Conv1D" for module in model.modules())
    if adapter.type == "ia3":  # IA3 scales the inputs of these modules, and the outputs of all others
        values.setdefault("feedforward_modules", [])
    made: PeftConfig = config(**values)
    return made


def _norm_names(model: PreTrainedModel) -> set[str]:
    """The last names of the norms."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if _is_norm(module)}


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1


def _check_norms(model: PreTrainedModel, targets: Any) -> None:
    """Raise RecipeError for targets of `ln_tuning` that are no norms: the trained weight would replace the base's."""
    for name, module in model.named_modules():
        is_named = re.fullmatch(targets, name) if isinstance(targets, str) else name.rpartition(".")[2] in targets
        if is_named and not _is_norm(module):
            text = f"adapter: ln_tuning trains norms, and {name} is none"
            raise RecipeError(text, hint=f"targets: [{', '.join(sorted(_norm_names(model)))}]")


def lora_config(model: PreTrainedModel, lora: LoraOptions, new_tokens: Sequence[int]) -> LoraConfig:
    """PEFT's configuration for the settings."""
    rank = lora.r or 16
    targets: Any = list(lora.targets) if isinstance(lora.targets, tuple) else lora.targets or ALL
    untargeted = untargeted_pattern(untargeted_parts(model), lora.targets)
    names = _last_names(model, untargeted)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * rank,  # type: ignore[arg-type]  # PEFT takes floats
        lora_dropout=lora.dropout,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        target_modules=sorted(names) if targets == ALL and lora.layers else targets,  # PEFT wants names for layers
        exclude_modules=untargeted or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=INITS.get(lora.init, lora.init),
        eva_config=EvaConfig() if lora.init == "eva" else None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        layers_to_transform=list(lora.layers) or None,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=_token_rows(model, new_tokens) if new_tokens else None,
        task_type="CAUSAL_LM",
    )
    _resolve_experts(config, model)
    if targets == ALL:
        resolved = config.target_modules
        config.target_modules = sorted(names & resolved if isinstance(resolved, set) else names)
    return config


def _resolve_experts(config: LoraConfig, model: PreTrainedModel) -> None:
    """Let PEFT replace the names of fused experts by their parameters, and remove the router, which it adds to them."""
    named = config.target_modules
    convert_peft_config_for_transformers(config, model, None)
    routers = {name for name in config.target_parameters or () if name.removesuffix(".weight") in ROUTERS}
    if not (isinstance(named, list | set) and routers & {f"{name}.weight" for name in named}):
        config.target_parameters = sorted(set(config.target_parameters or ()) - routers) or None


def _last_names(model: PreTrainedModel, untargeted: str) -> set[str]:
    """The last names of the linear modules that `all-linear` means."""
    names = {_last_name(path) for path in linear_names(model) if not re.fullmatch(untargeted, path)}
    return names - modules_without_adapter(model.config.get_text_config().model_type)


def _last_name(path: str) -> str:
    """The last part of a module's path; of a module in a list also the list's name, since "0" is a layer's name too."""
    parent, _, name = path.rpartition(".")
    return f"{_last_name(parent)}.{name}" if name.isdecimal() and parent else name


def _token_rows(model: PreTrainedModel, new_tokens: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's trainable_token_indices: rows of the embedding, and of lm_head where that is a tensor of its own.

    With the embedding's rows alone, an untied lm_head keeps arbitrary rows, and the model never generates the tokens.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)].rpartition(".")[2]: list(new_tokens) for layer in layers}
