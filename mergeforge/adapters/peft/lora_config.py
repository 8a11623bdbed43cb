"""LoRA's configuration: the scale of every module, and which configurations cannot be folded.

peft/tuners/lora/config.py and peft/utils/other.py (get_pattern_key) define it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.adapters.peft.kind import matching

# Fields that change what the tensors mean, and why a fold would be wrong with them.
_REFUSED = {
    "use_qalora": "QA-LoRA pools its input by groups, which is not supported",
    "alora_invocation_tokens": "activated LoRA applies only after certain tokens: it cannot be merged",
    "layer_replication": "it repeats layers of the base: stack these first (slices), then leave the field out",
    "arrow_config": "it routes between adapters: it cannot be merged; load it with PEFT",
    "megatron_config": "it was trained with Megatron's parallel layers, which is not supported; convert it to PEFT's",
}
# Starts that take something out of the base; the adapter is relative to what is left.
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Those of them that follow from the base alone (KaSA is a start, too, though it has a field of its own).
_REPEATABLE = ("pissa", "olora")
# Starts that leave the base as it is.
_PLAIN_STARTS = ("", "true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Fields that say how it was trained and change nothing about the tensors.
_IRRELEVANT = (
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config "
    "lora_alpha lora_bias lora_dropout lora_ga_config megatron_core modules_to_save monteclora_config peft_type "
    "lora_B_layout peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "target_parameters task_type "
    "trainable_token_indices use_bdlora use_dora use_kasa kasa_config use_rslora velora_config"
)
KNOWN = set(_IRRELEVANT.split()) | set(_REFUSED)


@dataclass(frozen=True)
class LoraSettings:
    """What a fold needs of adapter_config.json.

    `start`: what training took out of the base first, and the fold has to: "pissa", "olora" or "kasa" (""
    for nothing; "truncated" for a KaSA whose base is what that left). `blocks`: of BD-LoRA's block-diagonal
    factors. `scales`: every module's own, where no config says alpha and rank (rank 0: as the tensors are).
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    token_indices: Any
    ensure_weight_tying: bool
    target_parameters: tuple[str, ...] = ()
    peft_version: tuple[int, ...] = ()
    by_expert: bool = False
    start: str = ""
    blocks: int = 1
    scales: Mapping[str, float] | None = None

    def ranks_of(self, module: str) -> list[int]:
        """The ranks that it may have: those of every pattern that matches, else the default.

        PEFT takes the first pattern, but sorts them when it saves; the tensors tell which it was.
        """
        return [int(rank) for rank in matching(self.rank_pattern, module)] or [self.rank]

    def alphas_of(self, module: str) -> list[float]:
        """The alphas that it may have; PEFT takes the first of the file."""
        return [float(alpha) for alpha in matching(self.alpha_pattern, module)] or [self.alpha]

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        if self.scales is not None:
            return self.scales.get(module, 1.0)
        alpha = self.alphas_of(module)[0]
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names the module (PEFT compares the path's end)."""
        return any(module.endswith(name) for name in self.modules_to_save)


def read_settings(config: Mapping[str, Any], *, residual: bool = False, stacked: bool = False) -> LoraSettings:
    """Settings of an adapter_config.json of peft_type LORA.

    `residual`: the base that it is folded into is what its start left, so that nothing has to be taken out.
    `stacked`: that base's layers are already those of layer_replication.
    Raises ValueError, with the reason, for an adapter whose plain fold would be wrong.
    """
    for name, reason in _REFUSED.items():
        if config.get(name) and not (stacked and name == "layer_replication"):
            raise ValueError(f"its config sets {name}: {reason}")
    if unknown := sorted(name for name in set(config) - KNOWN if config[name] not in (None, False, {}, [])):
        raise ValueError(f"its config sets {unknown[0]} = {config[unknown[0]]!r}, whose meaning is unknown here")
    kasa = bool(config.get("kasa_config") or config.get("use_kasa"))
    start = ("truncated" if kasa else "") if residual else "kasa" if kasa else _start(config)
    if config.get("layer_replication") and start in (*_REPEATABLE, "kasa"):
        reason = "repeated layers share a weight, from which PEFT takes the start of each in turn"
        raise ValueError(f"its config has both layer_replication and the start {start}: {reason}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"its config needs a rank r of at least 1 and a number lora_alpha, not {rank!r} and {alpha!r}")
    return LoraSettings(
        rank=rank,
        alpha=float(alpha),
        rank_pattern=_patterns(config, "rank_pattern"),
        alpha_pattern=_patterns(config, "alpha_pattern"),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        token_indices=config.get("trainable_token_indices"),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        target_parameters=tuple(config.get("target_parameters") or ()),
        peft_version=tuple(int(part) for part in re.findall(r"\d+", str(config.get("peft_version") or ""))[:2]),
        by_expert=str(config.get("lora_B_layout") or "") == "expert_major",
        start=start,
        blocks=_blocks(config.get("use_bdlora")),
    )


def _patterns(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Patterns and their numbers. Raises ValueError for anything else."""
    found = config.get(name) or {}
    list(matching(found, ""))
    if bad := [value for value in found.values() if not isinstance(value, int | float) or isinstance(value, bool)]:
        raise ValueError(f"its config's {name} gives {bad[0]!r}, which is no number")
    return dict(found)


def _start(config: Mapping[str, Any]) -> str:
    """What has to be taken out of the original base first. Raises ValueError where that cannot be known."""
    start = str(config.get("init_lora_weights") or "").lower()
    if start not in _PLAIN_STARTS and not start.startswith(_RESIDUAL_STARTS):
        raise ValueError(f"its config says init_lora_weights: {start}, whose meaning is unknown here")
    if start in _REPEATABLE and not config.get("use_dora"):
        return start
    if start.startswith(_RESIDUAL_STARTS):
        reason = f"its config says init_lora_weights: {start}, so it is relative to a changed base, not to the original"
        advice = "fold it into the base that was saved with it and say base_is_residual: true, or convert it in PEFT"
        raise ValueError(f"{reason}; {advice} (save_pretrained with path_initial_model_for_weight_conversion)")
    return ""


def told_start(config: Mapping[str, Any], settings: LoraSettings) -> str:
    """How a start that changes the base is dealt with, in words; "" where there is none."""
    name = "KaSA" if settings.start in ("kasa", "truncated") else str(config.get("init_lora_weights") or "")
    if settings.start in (*_REPEATABLE, "kasa"):
        return f"what its start ({name}) took out of the original base is taken out first"
    if settings.start == "truncated" or name.lower().startswith(_RESIDUAL_STARTS):
        return f"the base is taken to be what its start ({name}) left"
    return ""


def _blocks(given: Any) -> int:
    """BD-LoRA's number of blocks; 1 for none."""
    count = given.get("nblocks", 1) if isinstance(given, Mapping) else 1
    if (given and not isinstance(given, Mapping)) or not isinstance(count, int) or count < 1:
        raise ValueError(f"its config says use_bdlora: {given!r}, which names no number of blocks")
    return count


def replicated(ranges: Sequence[Sequence[int]]) -> list[int]:
    """The base's layer that each layer of a layer_replication is: [[0, 2], [1, 3]] gives 0, 1, 1, 2.

    peft/tuners/tuners_utils.py, replicate_layers. Raises ValueError for what is no list of such pairs.
    """
    pairs = [tuple(one) for one in ranges if isinstance(one, list | tuple)] if isinstance(ranges, list | tuple) else []
    good = bool(pairs) and len(pairs) == len(ranges)
    if not good or not all(len(one) == 2 and all(isinstance(end, int) for end in one) for one in pairs):
        raise ValueError(f"layer_replication {ranges!r} is no list of [first layer, layer to stop before]")
    if not all(0 <= start < end for start, end in pairs):
        raise ValueError(f"layer_replication {ranges!r} holds a range without layers")
    return [layer for start, end in pairs for layer in range(start, end)]


def plain_settings(config: Mapping[str, Any]) -> LoraSettings:
    """What the tensors that any kind may bring (saved modules, trained tokens) need of a config."""
    indices = config.get("trainable_token_indices", config.get("token_indices"))
    saved = tuple(config.get("modules_to_save") or ())
    return LoraSettings(0, 0.0, {}, {}, False, False, False, saved, indices, False)
