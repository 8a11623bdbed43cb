"""LoRA's configuration: the scale of every module, and which configurations cannot be folded.

peft/tuners/lora/config.py and peft/utils/other.py (get_pattern_key) define it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Fields that change what the tensors mean, and why a fold would be wrong with them.
_REFUSED = {
    "use_qalora": "QA-LoRA pools its input by groups",
    "alora_invocation_tokens": "activated LoRA applies only after certain tokens: it cannot be merged",
    "layer_replication": "it repeats layers of the base",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters: it cannot be merged",
    "kasa_config": "it truncates the base first",
    "use_kasa": "it truncates the base first",
    "megatron_config": "it was trained with Megatron's parallel layers",
}
# Starts that change the base; the adapter is relative to the changed one.
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Fields that say how it was trained and change nothing about the tensors.
_IRRELEVANT = (
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config "
    "lora_alpha lora_bias lora_dropout lora_ga_config megatron_core modules_to_save monteclora_config peft_type "
    "lora_B_layout peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "target_parameters task_type "
    "trainable_token_indices use_dora use_rslora velora_config"
)
KNOWN = set(_IRRELEVANT.split()) | set(_REFUSED)


@dataclass(frozen=True)
class LoraSettings:
    """What a fold needs of adapter_config.json."""

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

    def ranks_of(self, module: str) -> list[int]:
        """The ranks that it may have: those of every pattern that matches, else the default.

        PEFT takes the first pattern, but sorts them when it saves; the tensors tell which it was.
        """
        return [int(rank) for rank in _by_pattern(self.rank_pattern, module)] or [self.rank]

    def alphas_of(self, module: str) -> list[float]:
        """The alphas that it may have; PEFT takes the first of the file."""
        return [float(alpha) for alpha in _by_pattern(self.alpha_pattern, module)] or [self.alpha]

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        alpha = self.alphas_of(module)[0]
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names the module (PEFT compares the path's end)."""
        return any(module.endswith(name) for name in self.modules_to_save)


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Settings of an adapter_config.json of peft_type LORA.

    Raises ValueError, with the reason, for an adapter whose plain fold would be wrong.
    """
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise ValueError(f"its config sets {name}: {reason}, which is not supported")
    if unknown := sorted(name for name in set(config) - KNOWN if config[name] not in (None, False, {}, [])):
        raise ValueError(f"its config sets {unknown[0]} = {config[unknown[0]]!r}, whose meaning is unknown here")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_RESIDUAL_STARTS):
        reason = f"its config says init_lora_weights: {start}, so it is relative to a changed base, not to the original"
        raise ValueError(
            f"{reason}; convert it in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"its config needs a rank r of at least 1 and a number lora_alpha, not {rank!r} and {alpha!r}")
    return LoraSettings(
        rank=rank,
        alpha=float(alpha),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        token_indices=config.get("trainable_token_indices"),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        target_parameters=tuple(config.get("target_parameters") or ()),
        peft_version=tuple(int(part) for part in re.findall(r"\d+", str(config.get("peft_version") or ""))[:2]),
        by_expert=str(config.get("lora_B_layout") or "") == "expert_major",
    )


def plain_settings(config: Mapping[str, Any]) -> LoraSettings:
    """What the tensors that any kind may bring (saved modules, trained tokens) need of a config."""
    indices = config.get("trainable_token_indices", config.get("token_indices"))
    saved = tuple(config.get("modules_to_save") or ())
    return LoraSettings(0, 0.0, {}, {}, False, False, False, saved, indices, False)


def _by_pattern(patterns: Mapping[str, Any], module: str) -> Iterator[Any]:
    """The values of the patterns, in the file's order, that match the module's path or its end."""
    return (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
