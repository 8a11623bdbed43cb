"""Read adapters of mlx-lm: W + scale * (a b)^T, with lora_a (in, r) and lora_b (r, out).

For an embedding a is (vocabulary, r) and b is (r, dim): W + scale * a b. DoRA's m is the norm of each row.
Stacked experts have a (experts, r, in) and b (experts, out, r): W_e + scale * b_e a_e. A "full" adapter holds the
tensors themselves (mlx_lm/tuner/lora.py, dora.py and utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergeforge.adapters.formats import ConvertedAdapter
from mergeforge.errors import SourceError
from mergeforge.tensors.stored import StoredTensor

MLX_STEM = "adapters"
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_PEFT_FACTORS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_FINE_TUNE_TYPES = ("lora", "dora", "full")


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json was written by mlx-lm."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_mlx(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], label: str) -> ConvertedAdapter:
    """Convert the tensors and scales of an adapter. Raises SourceError if it cannot be folded."""
    fine_tune_type = config.get("fine_tune_type", "lora")
    if fine_tune_type not in _FINE_TUNE_TYPES:
        raise SourceError(
            f"{label}: its config sets fine_tune_type: {fine_tune_type!r}", hint="known: " + ", ".join(_FINE_TUNE_TYPES)
        )
    converted: dict[str, StoredTensor] = {}
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith((".lora_a", ".lora_b"))}
    experts = {module for module in modules if (b := tensors.get(f"{module}.lora_b")) and len(b.info.shape) == 3}
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in experts:
            converted |= _split_experts(module, leaf, stored, tensors[f"{module}.lora_b"].info.shape[0], label)
            continue
        if leaf == "m" and module in modules:
            name = f"{module}.lora_magnitude_vector"
        converted[name] = replace(stored, info=stored.info.renamed(name))
    incomplete = sorted(module for module in modules if f"{module}.m" not in tensors)
    if fine_tune_type == "dora" and incomplete:
        raise SourceError(f"{label}: {incomplete[0]} has no magnitude m, but fine_tune_type is dora")
    scaled = {name.rpartition(".lora_")[0] for name in converted if ".lora_" in name}
    return ConvertedAdapter(converted, dict.fromkeys(scaled, _scale(config, label)) if scaled else {})


def _split_experts(module: str, leaf: str, stored: StoredTensor, count: int, label: str) -> dict[str, StoredTensor]:
    """Split stacked factors into those of each expert, under the names of Hugging Face checkpoints.

    lora_a may also be (experts * r, in). mlx-lm stacks Mixtral's w1, w2 and w3 as gate, down and up projections.
    """
    shape, path = stored.info.shape, module.replace(".switch_mlp.", ".experts.{}.")
    if leaf not in ("lora_a", "lora_b") or path == module or math.prod(shape[:-1]) % count:
        raise SourceError(f"{label}: {module}.{leaf} {list(shape)} belongs to experts with unknown names")
    if ".block_sparse_moe." in path:
        owner, _, last = path.rpartition(".")
        path = f"{owner}.{_MIXTRAL.get(last, last)}"
    expert_shape = (math.prod(shape[:-1]) // count, shape[-1])
    names = [f"{path.format(at)}.{_PEFT_FACTORS[leaf]}" for at in range(count)]
    infos = [replace(stored.info, name=name, shape=expert_shape) for name in names]
    size = infos[0].nbytes
    return {info.name: StoredTensor(info, stored.file, stored.offset + at * size) for at, info in enumerate(infos)}


def _scale(config: Mapping[str, Any], label: str) -> float:
    """The scale; mlx-lm of early 2024 wrote alpha, too, and multiplied the scale by alpha / rank."""
    parameters = config.get("lora_parameters")
    values = [parameters.get(name) if isinstance(parameters, Mapping) else None for name in ("scale", "rank", "alpha")]
    scale, rank, alpha = (
        value if isinstance(value, int | float) and not isinstance(value, bool) else None for value in values
    )
    if scale is None or (alpha is not None and not rank):
        raise SourceError(f"{label}: its config's lora_parameters need a numeric scale, not {parameters!r}")
    return float(scale) if alpha is None else float(scale * alpha / (rank or 1))
