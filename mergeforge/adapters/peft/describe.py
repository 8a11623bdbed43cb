"""An adapter in plain words: what it is, how strongly it acts, what it changes, and whether it can be merged.

From adapter_config.json and the names and shapes of its tensors; the base is not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergeforge.adapters.peft.keys import Key, clean_path, parse_key
from mergeforge.adapters.peft.kind import KINDS
from mergeforge.adapters.peft.lora_config import read_settings, told_start
from mergeforge.adapters.peft.unsupported import REFUSED
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import listing
from mergeforge.recipe.parameter_values import layer_of


def explain(config: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> list[str]:
    """Sentences about an adapter, the most important first."""
    name = str(config.get("peft_type") or "").upper()
    if name in REFUSED:
        return [f"{name}: cannot be merged: {REFUSED[name]}"]
    if name != "LORA" and name not in KINDS:
        return [f"{name or 'an adapter without a peft_type'}: not known here"]
    modules = _modules(name, tensors)
    found = [*_strength(name, config, modules), _where(modules), *_besides(config, modules)]
    trained = config.get("base_model_name_or_path")
    revision = f" at {config['revision']}" if config.get("revision") else ""
    return found + ([f"trained on {trained}{revision}"] if trained else [])


def _modules(name: str, tensors: Sequence[TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Each module's tensors by their role."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors:
        own = KINDS[name].role_of(clean_path(info.name)) if name in KINDS else None
        key = Key(*own) if own else parse_key(info.name)
        if key:
            modules.setdefault(key.module, {})[key.role] = info
    return modules


def _strength(name: str, config: Mapping[str, Any], modules: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[str]:
    if name != "LORA":
        yield f"{name}: {KINDS[name].about}"
        return
    try:
        settings = read_settings(config)
    except ValueError as error:
        yield f"LoRA, which cannot be merged: {error}"
        return
    ranks = {module: roles["A"].shape[0] for module, roles in modules.items() if "A" in roles}
    scales = Counter(round(settings.scale(module, rank), 6) for module, rank in ranks.items())
    words = "DoRA" if settings.dora else "LoRA"
    spread = sorted(set(ranks.values()))
    sizes = (
        f"rank {spread[0]}" if len(spread) == 1 else f"ranks {spread[0]} to {spread[-1]}" if spread else "no factors"
    )
    told = ", ".join(
        f"{scale:g} on {count}" if len(scales) > 1 else f"{scale:g}" for scale, count in scales.most_common(4)
    )
    how = "alpha / sqrt(r)" if settings.rslora else "alpha / r"
    yield f"{words} of {sizes}, scale {told} ({how})" if scales else f"{words} of {sizes}"
    if start := told_start(config, settings):
        yield start


def _where(modules: Mapping[str, Mapping[str, TensorInfo]]) -> str:
    """Which layers' modules it changes."""
    changed = [module for module, roles in modules.items() if module and not set(roles) <= {"weight", "bias"}]
    ends = Counter(module.rpartition(".")[2] for module in changed)
    layers = {layer_of(f"{module}.") for module in changed} - {None}
    kinds = listing((f"{end} ({count})" for end, count in ends.most_common()), 12)
    return f"changes {len(changed)} modules in {len(layers)} layers: {kinds}"


def _besides(config: Mapping[str, Any], modules: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[str]:
    whole = [module for module, roles in modules.items() if roles and set(roles) <= {"weight", "bias"}]
    if whole:
        yield f"brings {len(whole)} modules whole: {listing(whole)}"
    if tokens := [roles["tokens"].rows for roles in modules.values() if "tokens" in roles]:
        yield f"trained the rows of {max(tokens)} tokens"
    if config.get("target_parameters"):
        yield f"changes parameters of experts: {listing(map(str, config['target_parameters']))}"
    if config.get("layer_replication"):
        yield f"was trained on repeated layers: {config['layer_replication']}"
    if config.get("bias") not in (None, "none"):
        yield f"brings trained biases ({config['bias']})"
