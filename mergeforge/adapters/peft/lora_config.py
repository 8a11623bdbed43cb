"""LoRA's adapter_config.json: the scale of every module, and which configurations cannot be folded.

Defined by peft/tuners/lora/config.py and peft/utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeforge.adapters.peft.kind import matching_values, unknown_field

# Fields with which a fold would be wrong, and why.
_UNSUPPORTED_FIELDS = {
    "use_qalora": "QA-LoRA pools its input by groups, which is not supported",
    "alora_invocation_tokens": "activated LoRA applies only after certain tokens, so it cannot be merged",
    "layer_replication": "it repeats layers of the base; stack these layers first (slices), then remove the field",
    "arrow_config": "it routes between adapters, so it cannot be merged; load it with PEFT",
    "megatron_config": "Megatron's parallel layers are not supported; convert the adapter to PEFT's layers",
}
# Values of init_lora_weights that subtract something from the base; the adapter is relative to what remains.
_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Those that can be computed again from the base alone. (KaSA is another one, but has its own field.)
_RECOMPUTABLE_INITS = ("pissa", "olora")
# Values that leave the base unchanged.
_PLAIN_INITS = ("", "true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Fields about the training that do not change what the tensors mean.
_IGNORED_FIELDS = (
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config "
    "lora_alpha lora_bias lora_dropout lora_ga_config megatron_core modules_to_save monteclora_config peft_type "
    "lora_B_layout peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "target_parameters task_type "
    "trainable_token_indices use_bdlora use_dora use_kasa kasa_config use_rslora velora_config"
)
KNOWN_FIELDS = set(_IGNORED_FIELDS.split()) | set(_UNSUPPORTED_FIELDS)


@dataclass(frozen=True)
class LoraSettings:
    """The fields of adapter_config.json that a fold needs.

    `residual_init`: what the initialization subtracted from the base, and the fold has to subtract again:
    "pissa", "olora", "kasa", "" for nothing, or "truncated" for KaSA on a base that is already the residual.
    `bdlora_blocks`: the number of blocks of BD-LoRA's block-diagonal factors. `expert_major`: lora_B of fused
    experts keeps the ranks of one expert together (Unsloth). `scales`: the scale of each module, for formats
    without alpha and rank in a config (then `rank` is 0, and the tensors' rank is taken).
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
    expert_major: bool = False
    residual_init: str = ""
    bdlora_blocks: int = 1
    scales: Mapping[str, float] | None = None

    def ranks_of(self, module: str) -> list[int]:
        """The ranks the module may have: those of all patterns that match, else the default.

        PEFT uses the first pattern, but sorts the patterns when it saves; the tensors show which one it was.
        """
        return [int(rank) for rank in matching_values(self.rank_pattern, module)] or [self.rank]

    def alphas_of(self, module: str) -> list[float]:
        """The alphas the module may have; PEFT uses the first one in the file."""
        return [float(alpha) for alpha in matching_values(self.alpha_pattern, module)] or [self.alpha]

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA."""
        if self.scales is not None:
            return self.scales.get(module, 1.0)
        alpha = self.alphas_of(module)[0]
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names the module, or one that it is in (PEFT compares the end of the path)."""
        parts = module.split(".")
        paths = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(path.endswith(name) for path in paths for name in self.modules_to_save)


def read_settings(
    config: Mapping[str, Any], *, base_is_residual: bool = False, base_is_stacked: bool = False
) -> LoraSettings:
    """Read an adapter_config.json of peft_type LORA.

    `base_is_residual`: the base is already what the initialization left, so nothing has to be subtracted.
    `base_is_stacked`: the base already has the layers of layer_replication.
    Raises ValueError, with the reason, if the adapter cannot be folded correctly.
    """
    for name, reason in _UNSUPPORTED_FIELDS.items():
        if config.get(name) and not (base_is_stacked and name == "layer_replication"):
            raise ValueError(f"its config sets {name}: {reason}")
    if unknown := sorted(name for name in set(config) - KNOWN_FIELDS if config[name] not in (None, False, {}, [])):
        raise ValueError(unknown_field(unknown[0], config[unknown[0]]))
    kasa = bool(config.get("kasa_config") or config.get("use_kasa"))
    init = ("truncated" if kasa else "") if base_is_residual else "kasa" if kasa else _residual_init(config)
    if config.get("layer_replication") and init in (*_RECOMPUTABLE_INITS, "kasa"):
        reason = (
            "repeated layers share one weight, and PEFT subtracts the initialization of each of them from it in turn"
        )
        raise ValueError(f"its config sets both layer_replication and the {init} initialization: {reason}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"its config needs a rank r >= 1 and a numeric lora_alpha, not {rank!r} and {alpha!r}")
    return LoraSettings(
        rank=rank,
        alpha=float(alpha),
        rank_pattern=_numeric_patterns(config, "rank_pattern"),
        alpha_pattern=_numeric_patterns(config, "alpha_pattern"),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        token_indices=config.get("trainable_token_indices"),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        target_parameters=tuple(config.get("target_parameters") or ()),
        peft_version=tuple(int(part) for part in re.findall(r"\d+", str(config.get("peft_version") or ""))[:2]),
        expert_major=str(config.get("lora_B_layout") or "") == "expert_major",
        residual_init=init,
        bdlora_blocks=_bdlora_blocks(config.get("use_bdlora")),
    )


def _numeric_patterns(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Read a mapping of patterns to numbers. Raises ValueError for anything else."""
    patterns = config.get(name) or {}
    list(matching_values(patterns, ""))
    if bad := [value for value in patterns.values() if not isinstance(value, int | float) or isinstance(value, bool)]:
        raise ValueError(f"its config's {name} has the value {bad[0]!r}, which is not a number")
    return dict(patterns)


def _residual_init(config: Mapping[str, Any]) -> str:
    """What has to be subtracted from the original base. Raises ValueError if it cannot be computed."""
    init = str(config.get("init_lora_weights") or "").lower()
    if init not in _PLAIN_INITS and not init.startswith(_RESIDUAL_INITS):
        raise ValueError(f"its config sets init_lora_weights: {init}, and this version does not know that value")
    if init in _RECOMPUTABLE_INITS and not config.get("use_dora"):
        return init
    if init.startswith(_RESIDUAL_INITS):
        reason = f"its config sets init_lora_weights: {init}, so it is relative to a changed base, not to the original"
        advice = "fold it into the base that was saved with it and set base_is_residual: true, or convert it with PEFT"
        raise ValueError(f"{reason}; {advice} (save_pretrained with path_initial_model_for_weight_conversion)")
    return ""


def describe_init(config: Mapping[str, Any], settings: LoraSettings) -> str:
    """A note on how an initialization that changed the base is handled; "" if it did not change it."""
    name = "KaSA" if settings.residual_init in ("kasa", "truncated") else str(config.get("init_lora_weights") or "")
    if settings.residual_init in (*_RECOMPUTABLE_INITS, "kasa"):
        return f"what its initialization ({name}) subtracted from the original base is subtracted again"
    if settings.residual_init == "truncated" or name.lower().startswith(_RESIDUAL_INITS):
        return f"the base is treated as the residual that its initialization ({name}) left"
    return ""


def _bdlora_blocks(config: Any) -> int:
    """BD-LoRA's number of blocks; 1 if it is not used."""
    count = config.get("nblocks", 1) if isinstance(config, Mapping) else 1
    if (config and not isinstance(config, Mapping)) or not isinstance(count, int) or count < 1:
        raise ValueError(f"its config sets use_bdlora: {config!r}, which has no valid number of blocks (nblocks)")
    return count


def replicated_layers(ranges: Sequence[Sequence[int]]) -> list[int]:
    """The base's layer behind each layer of a layer_replication: [[0, 2], [1, 3]] gives 0, 1, 1, 2.

    As replicate_layers of peft/tuners/tuners_utils.py. Raises ValueError for anything but a list of such pairs.
    """
    pairs = (
        [tuple(pair) for pair in ranges if isinstance(pair, list | tuple)] if isinstance(ranges, list | tuple) else []
    )
    are_lists = bool(pairs) and len(pairs) == len(ranges)
    if not are_lists or not all(len(pair) == 2 and all(isinstance(end, int) for end in pair) for pair in pairs):
        raise ValueError(f"layer_replication {ranges!r} is not a list of [first layer, end layer] pairs (end excluded)")
    if not all(0 <= start < end for start, end in pairs):
        raise ValueError(f"layer_replication {ranges!r} contains an empty or negative range")
    return [layer for start, end in pairs for layer in range(start, end)]


def plain_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Read what tensors of any method (saved modules, trained tokens) need from a config."""
    indices = config.get("trainable_token_indices", config.get("token_indices"))
    saved = tuple(config.get("modules_to_save") or ())
    return LoraSettings(0, 0.0, {}, {}, False, False, False, saved, indices, False)
