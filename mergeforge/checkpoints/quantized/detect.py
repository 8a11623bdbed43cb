"""Which stored tensors are one quantised weight, and what is left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mergeforge.checkpoints.quantized import bitsandbytes, fp8_mxfp4, packed_int
from mergeforge.checkpoints.quantized.detection_state import SIXTEEN_BIT, Held, dtype_of, settings_of, without_settings
from mergeforge.errors import SourceError, listing
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

KNOWN = ("bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4", "gptq", "awq", "compressed-tensors", "modelopt")
LAYOUTS = ("marlin", "marlin-24", "sparse-bitmask", "sparse-24-bitmask", "mxfp6-pack-quantized")  # not understood
FORMATS = (
    bitsandbytes.four_bit,
    bitsandbytes.eight_bit,
    fp8_mxfp4.experts,
    packed_int.words_of_inputs,
    packed_int.packed,
    packed_int.modelopt,
    packed_int.eight_bit,
    fp8_mxfp4.eight_bit,
)
# What only an engine with quantised activations or caches needs; a 16-bit model has no place for it.
ACTIVATIONS = (
    *("input_scale", "input_global_scale", "input_zero_point", "activation_scale", "input_scale_ub"),
    *("output_scale", "k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point"),
)
PACKED = (
    *("qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "nested_absmax", "weight_packed", "weight_shape"),
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_global_scale"),
)


def recognise(
    label: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[Mapping[str, LazyTensor], Mapping[str, Any], tuple[str, ...]]:
    """A checkpoint's tensors with quantised groups as one way each, its config without their settings, and notes.

    Raises SourceError where something is quantised in a way that is not understood.
    """
    settings = settings_of(config)
    method = str(settings.get("quant_method") or _method_by_keys(settings)).lower()
    if settings and method not in KNOWN:
        hint = f"understood: {', '.join(KNOWN)}; else {SIXTEEN_BIT}"
        raise SourceError(f"{label} is quantised with {method!r}, which cannot be read", hint=hint)
    layouts = {str(settings.get(key, "")).lower() for key in ("format", "checkpoint_format")}
    if bad := sorted(layouts & set(LAYOUTS)):
        raise SourceError(f"{label} is quantised in the layout {bad[0]!r}, which cannot be read", hint=SIXTEEN_BIT)
    held = Held(label, tensors, settings, dtype_of(config))
    for find in FORMATS:
        find(held)
    if not settings and not held.found:
        return tensors, config, ()
    dropped = [name for name in tensors if name.rpartition(".")[2] in ACTIVATIONS and name not in held.used]
    _check(held, config, dropped)
    return _with_found(held, dropped), without_settings(config), _notes(held, dropped)


def _method_by_keys(settings: Mapping[str, Any]) -> str:
    """The method of old configs that do not name it."""
    return "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(settings) else "unknown"


def _with_found(held: Held, dropped: list[str]) -> dict[str, LazyTensor]:
    """Every tensor in the order of the files; a group stands where its codes stood."""
    found: dict[str, LazyTensor] = {}
    for name, stored in held.tensors.items():
        way = held.found.get(name)
        if way is not None:
            found[way.info.name] = way
        elif name not in held.used and name not in dropped:
            found[name] = stored
    return found


def _check(held: Held, config: Mapping[str, Any], dropped: list[str]) -> None:
    """Raises SourceError for what is packed but belongs to no group, and for weights that stand transposed."""
    from mergeforge.checkpoints.names import CONV1D_MODELS  # which imports what opens checkpoints

    spoken = held.used.union(dropped)
    left = [name for name in held.tensors if name not in spoken and _is_packed(name, held.tensors[name])]
    if left:
        raise SourceError(
            f"{held.label}: {listing(left)} belong to no quantised weight that is understood", hint=SIXTEEN_BIT
        )
    twice = [way.info.name for at, way in held.found.items() if way.info.name in held.tensors and way.info.name != at]
    if twice:
        raise SourceError(f"{held.label} holds {listing(twice)} twice, plain and quantised", hint=SIXTEEN_BIT)
    if held.found and config.get("model_type") in CONV1D_MODELS:
        text = f"{held.label}: a {config['model_type']} is quantised transposed, which cannot be read"
        raise SourceError(text, hint=SIXTEEN_BIT)


def _is_packed(name: str, stored: StoredTensor) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in PACKED or stored.info.dtype.startswith("F8_") or (leaf == "weight" and not stored.info.is_float)


def _notes(held: Held, dropped: list[str]) -> tuple[str, ...]:
    counts = Counter(way.packing.about for way in held.found.values())
    notes = [f"{held.label}: dequantised {count} tensors of {about}" for about, count in counts.items()]
    if not counts:
        notes.append(f"{held.label}: its config says that it is quantised, but no tensor is; that is left out")
    if dropped:
        notes.append(f"{held.label}: {len(dropped)} scales of activations are left out")
    return tuple(notes)
