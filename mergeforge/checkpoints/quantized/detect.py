"""Find the stored tensors that make up quantized weights, and refuse what is left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mergeforge.checkpoints.names import CONV1D_MODELS
from mergeforge.checkpoints.quantized import bitsandbytes, fp8_mxfp4, packed_int
from mergeforge.checkpoints.quantized.detection_state import (
    USE_16_BIT,
    QuantGroupFinder,
    config_dtype,
    quant_config_of,
    without_quant_config,
)
from mergeforge.errors import SourceError, format_list
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

QUANT_METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4", "gptq", "awq", "compressed-tensors", "modelopt")
UNSUPPORTED_LAYOUTS = ("marlin", "marlin-24", "sparse-bitmask", "sparse-24-bitmask", "mxfp6-pack-quantized")
DETECTORS = (
    bitsandbytes.detect_bnb_4bit,
    bitsandbytes.detect_bnb_int8,
    fp8_mxfp4.detect_mxfp4_experts,
    packed_int.detect_gptq_awq,
    packed_int.detect_packed,
    packed_int.detect_modelopt_nvfp4,
    packed_int.detect_ct_int8,
    fp8_mxfp4.detect_fp8,
)
# Scales that only an engine with quantized activations or caches needs; a 16-bit model cannot hold them.
ACTIVATIONS = (
    *("input_scale", "input_global_scale", "input_zero_point", "activation_scale", "input_scale_ub"),
    *("output_scale", "k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point"),
)
PACKED = (
    *("qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "nested_absmax", "weight_packed", "weight_shape"),
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_global_scale"),
)


def detect_quantization(
    label: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[Mapping[str, LazyTensor], Mapping[str, Any], tuple[str, ...]]:
    """Return the tensors with each quantized group as one tensor, the config without quantization_config, and notes.

    Raises SourceError for an unsupported quantization.
    """
    quant_config = quant_config_of(config)
    method = str(quant_config.get("quant_method") or _method_by_keys(quant_config)).lower()
    if quant_config and method not in QUANT_METHODS:
        hint = f"supported: {', '.join(QUANT_METHODS)}; otherwise {USE_16_BIT}"
        raise SourceError(f"{label} is quantized with {method!r}, which is not supported", hint=hint)
    layouts = {str(quant_config.get(key, "")).lower() for key in ("format", "checkpoint_format")}
    if unsupported := sorted(layouts & set(UNSUPPORTED_LAYOUTS)):
        raise SourceError(
            f"{label} is quantized in the layout {unsupported[0]!r}, which is not supported", hint=USE_16_BIT
        )
    finder = QuantGroupFinder(label, tensors, quant_config, config_dtype(config))
    for detect in DETECTORS:
        detect(finder)
    if not quant_config and not finder.groups:
        return tensors, config, ()
    dropped = [name for name in tensors if name.rpartition(".")[2] in ACTIVATIONS and name not in finder.used]
    _check(finder, config, dropped)
    return _with_groups(finder, dropped), without_quant_config(config), _notes(finder, dropped)


def _method_by_keys(quant_config: Mapping[str, Any]) -> str:
    """The quantization method of old configs that do not name it."""
    return "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(quant_config) else "unknown"


def _with_groups(finder: QuantGroupFinder, dropped: list[str]) -> dict[str, LazyTensor]:
    """Every tensor in the order of the files; a group takes the position of its codes."""
    tensors: dict[str, LazyTensor] = {}
    for name, stored in finder.tensors.items():
        quantized = finder.groups.get(name)
        if quantized is not None:
            tensors[quantized.info.name] = quantized
        elif name not in finder.used and name not in dropped:
            tensors[name] = stored
    return tensors


def _check(finder: QuantGroupFinder, config: Mapping[str, Any], dropped: list[str]) -> None:
    """Raise SourceError for packed tensors that belong to no group, and for weights that are stored transposed."""
    known = finder.used.union(dropped)
    leftover = [name for name in finder.tensors if name not in known and _is_packed(name, finder.tensors[name])]
    if leftover:
        raise SourceError(
            f"{finder.label}: {format_list(leftover)} belong to no supported quantized weight", hint=USE_16_BIT
        )
    names = {name: tensor.info.name for name, tensor in finder.groups.items()}
    duplicates = [name for first, name in names.items() if name in finder.tensors and name != first]
    if duplicates:
        raise SourceError(f"{finder.label} holds {format_list(duplicates)} twice, plain and quantized", hint=USE_16_BIT)
    if finder.groups and config.get("model_type") in CONV1D_MODELS:
        text = f"{finder.label}: quantized {config['model_type']} weights are stored transposed, which is not supported"
        raise SourceError(text, hint=USE_16_BIT)


def _is_packed(name: str, stored: StoredTensor) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in PACKED or stored.info.dtype.startswith("F8_") or (leaf == "weight" and not stored.info.is_float)


def _notes(finder: QuantGroupFinder, dropped: list[str]) -> tuple[str, ...]:
    counts = Counter(tensor.layout.label for tensor in finder.groups.values())
    notes = [f"{finder.label}: dequantized {count} tensors of {label}" for label, count in counts.items()]
    if not counts:
        notes.append(
            f"{finder.label}: its config has a quantization_config, but no tensor is quantized; the setting is dropped"
        )
    if dropped:
        notes.append(f"{finder.label}: {len(dropped)} scales of activations are dropped")
    return tuple(notes)
