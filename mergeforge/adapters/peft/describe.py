"""Describe an adapter in words: its method, scale, the modules it changes, and whether it can be merged.

Uses adapter_config.json and the names and shapes of the tensors; the base is not needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergeforge.adapters.peft.keys import Key, clean_path, parse_key
from mergeforge.adapters.peft.kind import PEFT_METHODS
from mergeforge.adapters.peft.lora_config import describe_init, read_settings
from mergeforge.adapters.peft.unsupported import UNSUPPORTED
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import format_list
from mergeforge.recipe.parameter_values import layer_of


def describe_adapter(config: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> list[str]:
    """Return lines about an adapter, the most important first."""
    name = str(config.get("peft_type") or "").upper()
    if name in UNSUPPORTED:
        return [f"{name}: cannot be merged: {UNSUPPORTED[name]}"]
    if name != "LORA" and name not in PEFT_METHODS:
        return [f"{name or 'an adapter without a peft_type'}: not supported by this version"]
    modules = _modules(name, tensors)
    lines = [*_strength(name, config, modules), _where(modules), *_extras(config, modules)]
    trained = config.get("base_model_name_or_path")
    revision = f" at {config['revision']}" if config.get("revision") else ""
    return lines + ([f"trained on {trained}{revision}"] if trained else [])


def _modules(name: str, tensors: Sequence[TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Group the tensors by module, and by role within a module."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors:
        own = PEFT_METHODS[name].parse_key(clean_path(info.name)) if name in PEFT_METHODS else None
        key = Key(*own) if own else parse_key(info.name)
        if key:
            modules.setdefault(key.module, {})[key.role] = info
    return modules


def _strength(name: str, config: Mapping[str, Any], modules: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[str]:
    if name != "LORA":
        yield f"{name}: {PEFT_METHODS[name].description}"
        return
    try:
        settings = read_settings(config)
    except ValueError as error:
        yield f"LoRA that cannot be merged: {error}"
        return
    ranks = {module: roles["A"].shape[0] for module, roles in modules.items() if "A" in roles}
    scales = Counter(round(settings.scale(module, rank), 6) for module, rank in ranks.items())
    method = "DoRA" if settings.dora else "LoRA"
    distinct = sorted(set(ranks.values()))
    rank = f"ranks {distinct[0]} to {distinct[-1]}" if len(distinct) > 1 else f"rank {next(iter(distinct), 0)}"
    counts = ", ".join(
        f"{scale:g} on {count}" if len(scales) > 1 else f"{scale:g}" for scale, count in scales.most_common(4)
    )
    formula = "alpha / sqrt(r)" if settings.rslora else "alpha / r"
    yield f"{method} of {rank}, scale {counts} ({formula})" if scales else f"{method} without factors"
    if note := describe_init(config, settings):
        yield note


def _where(modules: Mapping[str, Mapping[str, TensorInfo]]) -> str:
    """Count the modules and layers that the adapter changes."""
    changed = [module for module, roles in modules.items() if module and not set(roles) <= {"weight", "bias"}]
    ends = Counter(module.rpartition(".")[2] for module in changed)
    layers = {layer_of(f"{module}.") for module in changed} - {None}
    kinds = format_list((f"{end} ({count})" for end, count in ends.most_common()), 12)
    return f"changes {len(changed)} modules in {len(layers)} layers: {kinds}"


def _extras(config: Mapping[str, Any], modules: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[str]:
    saved = [module for module, roles in modules.items() if roles and set(roles) <= {"weight", "bias"}]
    if saved:
        yield f"replaces whole modules ({len(saved)}): {format_list(saved)}"
    if tokens := [roles["tokens"].rows for roles in modules.values() if "tokens" in roles]:
        yield f"trained the embedding rows of {max(tokens)} tokens"
    if config.get("target_parameters"):
        yield f"changes parameters of experts: {format_list(map(str, config['target_parameters']))}"
    if config.get("layer_replication"):
        yield f"was trained on repeated layers: {config['layer_replication']}"
    if config.get("bias") not in (None, "none"):
        yield f"has trained biases ({config['bias']})"
