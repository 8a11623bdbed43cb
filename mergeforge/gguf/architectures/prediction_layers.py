"""Layers that predict further tokens (MTP, "nextn"): stored apart or after the last layer, in GGUF further blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult
from mergeforge.gguf.key_values import Value, u32

_NAMES = {
    "eh_proj": "eh_proj",
    "embed_tokens": "embed_tokens",
    "enorm": "enorm",
    "hnorm": "hnorm",
    "shared_head.head": "shared_head_head",
    "shared_head.norm": "shared_head_norm",
}
_OWN = re.compile(r"model\.layers\.(\d+)\.(" + "|".join(map(re.escape, _NAMES)) + r")\.weight$")
_OUTSIDE = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}


@dataclass(frozen=True)
class PredictionLayers:
    """How many there are in the checkpoint, how their tensors are called as layers, and the rule for them."""

    count: int
    rename: Callable[[str], str]
    rule: Callable[[HFTensor], RuleResult]
    notes: tuple[str, ...] = ()


def prediction_layers(model: HFModel, prefix: str = "", shift: float = 1.0) -> PredictionLayers:
    """The layers under `prefix` (`mtp.`), or after the last one. `shift` is added to their own norms."""
    pattern = re.compile(rf"^(?:model\.|language_model\.)*{re.escape(prefix)}layers\.(\d+)\.")
    found = [int(match[1]) for name in model.tensors if (match := pattern.search(name))]
    count = max(found, default=-1) + 1 - (0 if prefix else model.layers)
    stated = model.find("mtp_num_hidden_layers", "num_nextn_predict_layers") or 0
    notes: tuple[str, ...] = ()
    if count <= 0 and stated:
        notes = ("the model has no layers that predict further tokens: the file is written without them",)

    def rename(name: str) -> str:
        return _as_layer(name, prefix, model.layers) if prefix else name

    def rule(stored: HFTensor) -> RuleResult:
        match = _OWN.match(stored.name)
        if not match:
            return None
        part = _NAMES[match[2]]
        return (stored.block_tensor(f"nextn.{part}", add=shift if part.endswith("norm") else 0.0),)

    return PredictionLayers(max(count, 0), rename, rule, notes)


def prediction_layer_keys(count: int, always: bool = False) -> dict[str, Value]:
    """Their number; 0 only where the converter writes it too (`always`)."""
    return {"nextn_predict_layers": u32(count)} if count or always else {}


def _as_layer(name: str, prefix: str, layers: int) -> str:
    inner = name.removeprefix("model.")
    if not inner.startswith(prefix):
        return name
    parts = inner.removeprefix(prefix).split(".", 2)
    if parts[0] == "layers":
        return f"model.layers.{layers + int(parts[1])}.{parts[2]}"
    own = _OUTSIDE.get(parts[0])
    return f"model.layers.{layers}.{own}.{parts[1]}" if own else name
