"""Adapters of mlx-lm: W + scale * (a b)^T, with lora_a (in, r) and lora_b (r, out).

An embedding's are (vocabulary, r) and (r, dim): W + scale * a b. DoRA's m is the norm of each row. Stacked
experts have a (experts, r, in) and b (experts, out, r): W_e + scale * b_e a_e. A "full" one holds the tensors
themselves (mlx_lm/tuner/lora.py, dora.py and utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergeforge.adapters.formats import Translated
from mergeforge.errors import SourceError
from mergeforge.tensors.stored import StoredTensor

STEM = "adapters"
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_PLAIN = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_TYPES = ("lora", "dora", "full")


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is mlx-lm's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_mlx(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], label: str) -> Translated:
    """The tensors and scales of an adapter. Raises SourceError for one that cannot be folded."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in _TYPES:
        raise SourceError(f"{label}: its config says fine_tune_type: {kind!r}", hint="known: " + ", ".join(_TYPES))
    found: dict[str, StoredTensor] = {}
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith((".lora_a", ".lora_b"))}
    experts = {one for one in modules if (b := tensors.get(f"{one}.lora_b")) and len(b.info.shape) == 3}
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in experts:
            found |= _by_expert(module, leaf, stored, tensors[f"{module}.lora_b"].info.shape[0], label)
            continue
        if leaf == "m" and module in modules:
            name = f"{module}.lora_magnitude_vector"
        found[name] = replace(stored, info=stored.info.renamed(name))
    if kind == "dora" and (lacking := sorted(one for one in modules if f"{one}.m" not in tensors)):
        raise SourceError(f"{label}: {lacking[0]} lacks its m, though fine_tune_type is dora")
    scaled = {name.rpartition(".lora_")[0] for name in found if ".lora_" in name}
    return Translated(found, dict.fromkeys(scaled, _scale(config, label)) if scaled else {})


def _by_expert(module: str, leaf: str, stored: StoredTensor, count: int, label: str) -> dict[str, StoredTensor]:
    """A stack of factors as those of each expert, under the names that Hugging Face's checkpoints have.

    lora_a may be (experts * r, in), too. mlx-lm stacks Mixtral's w1, w2 and w3 as gate, down and up projections.
    """
    shape, path = stored.info.shape, module.replace(".switch_mlp.", ".experts.{}.")
    if leaf not in ("lora_a", "lora_b") or path == module or math.prod(shape[:-1]) % count:
        raise SourceError(f"{label}: {module}.{leaf} {list(shape)} is of experts whose names are unknown")
    if ".block_sparse_moe." in path:
        owner, _, last = path.rpartition(".")
        path = f"{owner}.{_MIXTRAL.get(last, last)}"
    one = (math.prod(shape[:-1]) // count, shape[-1])
    names = [f"{path.format(at)}.{_PLAIN[leaf]}" for at in range(count)]
    infos = [replace(stored.info, name=name, shape=one) for name in names]
    size = infos[0].nbytes
    return {info.name: StoredTensor(info, stored.file, stored.offset + at * size) for at, info in enumerate(infos)}


def _scale(config: Mapping[str, Any], label: str) -> float:
    """The scale as it is; mlx-lm of early 2024 multiplied it by alpha / rank, and wrote alpha."""
    given = config.get("lora_parameters")
    values = [given.get(name) for name in ("scale", "rank", "alpha")] if isinstance(given, Mapping) else [None] * 3
    scale, rank, alpha = (one if isinstance(one, int | float) and not isinstance(one, bool) else None for one in values)
    if scale is None or (alpha is not None and not rank):
        raise SourceError(f"{label}: its config's lora_parameters need a number scale, not {given!r}")
    return float(scale) if alpha is None else float(scale * alpha / (rank or 1))
