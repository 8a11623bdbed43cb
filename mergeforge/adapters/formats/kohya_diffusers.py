"""Read single-file adapters of image models, whose components (UNet, text encoders) are separate models.

kohya and LyCORIS write `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`, with '_' for '.' in the
module's path (diffusers' or the original UNet's); diffusers writes
`unet.down_blocks.0.attentions.0.proj_in.lora_A.weight`, or older names. The scale is alpha / r, with alpha from a
tensor `alpha` next to the factors (without one the scale is 1), or from diffusers' metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergeforge.adapters.formats import ConvertedAdapter
from mergeforge.adapters.formats.image_resolver import ModuleResolver, NamedTensor, without_other_encoders
from mergeforge.adapters.peft.keys import KEY_PREFIX
from mergeforge.adapters.peft.kinds.lycoris import LYCORIS
from mergeforge.adapters.peft.lora_config import LoraSettings, read_settings
from mergeforge.checkpoints.model import ModelSource
from mergeforge.errors import SourceError, format_list
from mergeforge.tensors.stored import StoredTensor

METADATA = "lora_adapter_metadata"
# Suffix -> the suffix that peft/keys.py knows.
_OTHER_NAMES = "known are the names of diffusers, kohya and the original SD, SDXL and Flux; is it for such a model?"
_ROLES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_mid.weight": "lora_mid.weight",
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_A.default.weight": "lora_A.weight",
    "lora_B.default.weight": "lora_B.weight",
    "lora_B.bias": "lora_B.bias",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{f"hada_{role}": f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{role}": f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_KOHYA = re.compile(r"(lora_(?:te\d?|unet|transformer|prior_unet|prior_te)|lycoris|lora)_(.+)")
_COMPONENTS = re.compile(r"(?:model\.)?(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|diffusion_model)\.(.+)")
_X_FLUX = re.compile(r"(.*)(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight")
_X_FLUX_MODULES = {"": {"qkv": "linear1.qkv", "proj": "linear2"}}
_X_FLUX_MODULES |= {
    at: {part: f"{tower}_attn.{part}" for part in ("qkv", "proj")} for at, tower in (("1", "img"), ("2", "txt"))
}
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")


def read_kohya_diffusers(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], label: str, base: ModelSource
) -> ConvertedAdapter:
    """Return the tensors that apply to the base, and the scale of every module.

    A component of which the base has no module belongs to another model: it is skipped with a note, as long as
    the base has all modules of another component. Raises SourceError for unknown names or settings.
    """
    named = [_parse_name(name, stored, label) for name, stored in tensors.items()]
    resolver = ModuleResolver(label, base)
    components = dict.fromkeys(tensor.component for tensor in named)
    known = [name for name in components if any(resolver.find(tensor) for tensor in named if tensor.component == name)]
    known = without_other_encoders(known, named, resolver)
    relevant = [tensor for tensor in named if tensor.component in known]
    if not relevant:
        examples = format_list(dict.fromkeys(tensor.stored.info.name for tensor in named), 3)
        raise SourceError(f"{label}: {base.label} has none of its modules ({examples})", hint=_OTHER_NAMES)
    unmatched = [tensor.stored.info.name for tensor in relevant if tensor.flattened and not resolver.find(tensor)]
    if unmatched:
        text = f"{label}: {format_list(dict.fromkeys(unmatched))} match no tensor of {base.label}"
        raise SourceError(text, hint=f"other modules of it do match; {_OTHER_NAMES}")
    notes = [_skipped_note(name, named, label, base) for name in components if name not in known]
    modules: dict[str, dict[str, NamedTensor]] = {}
    for tensor in relevant:
        roles = modules.setdefault(resolver.find(tensor) or tensor.module, {})
        if tensor.role in roles:
            first = roles[tensor.role].stored.info.name
            raise SourceError(f"{label}: {tensor.stored.info.name!r} duplicates {first!r}")
        roles[tensor.role] = tensor
    converted = _convert(modules, _metadata_settings(metadata, known, label), label, tuple(notes))
    return replace(converted, aliases=resolver.aliases)


def _parse_name(name: str, stored: StoredTensor, label: str) -> NamedTensor:
    name = name.removeprefix(KEY_PREFIX)
    if processor := _PROCESSOR.fullmatch(name):
        leaf = "to_out.0" if processor[2] == "to_out" else processor[2]
        name = f"{processor[1]}.{leaf}.lora_{processor[3]}.weight"
    if (x_flux := _X_FLUX.fullmatch(name)) and (x_flux[2] == "single") == (x_flux[5] == ""):
        module = _X_FLUX_MODULES[x_flux[5]][x_flux[4]]
        name = f"{x_flux[1]}{x_flux[2]}_blocks.{x_flux[3]}.{module}.lora_{x_flux[6]}.weight"
    suffix = next((ending for ending in _ROLES if name.endswith("." + ending)), None)
    if suffix is None:
        raise SourceError(f"{label}: unknown tensor {name!r}", hint="is it a LoRA, LoHa or LoKr adapter?")
    path = name[: -len(suffix) - 1]
    kohya = _KOHYA.fullmatch(path) if "." not in path else None
    parts = kohya or _COMPONENTS.fullmatch(path)
    component, module = (parts[1], parts[2]) if parts else ("", path)
    return NamedTensor(component, module, _ROLES[suffix], stored, kohya is not None)


def _skipped_note(component: str, named: list[NamedTensor], label: str, base: ModelSource) -> str:
    count = sum(tensor.component == component for tensor in named)
    return f"{label}: skipping its {count} tensors for {component or 'another model'}: {base.label} has none of them"


def _metadata_settings(metadata: Mapping[str, str], components: list[str], label: str) -> dict[str, LoraSettings]:
    """Read diffusers' LoRA configuration of each component from the file's metadata."""
    if METADATA not in metadata:
        return {}
    try:
        parsed: Any = json.loads(metadata[METADATA])
        configs = {component: _component_config(parsed, component) for component in components}
        if missing := [component for component in components if not configs[component]]:
            raise ValueError(f"it has no settings for {missing[0] or 'tensors without a component'}")
        settings = {component: read_settings(config) for component, config in configs.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{label}: its {METADATA}: {error}") from None
    if inits := [component.residual_init for component in settings.values() if component.residual_init]:
        raise SourceError(f"{label}: its {METADATA} sets init_lora_weights: {inits[0]}, which is not supported there")
    return settings


def _component_config(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    """A component's entries of the metadata: those under its name, or all of them if the file is for one model."""
    prefix = f"{component}." if component else ""
    return {
        key[len(prefix) :]: value
        for key, value in metadata.items()
        if key.startswith(prefix) and "." not in key[len(prefix) :]
    }


def _convert(
    modules: Mapping[str, Mapping[str, NamedTensor]],
    settings: Mapping[str, LoraSettings],
    label: str,
    notes: tuple[str, ...],
) -> ConvertedAdapter:
    tensors: dict[str, StoredTensor] = {}
    scales: dict[str, float] = {}
    alphas: dict[str, float] = {}
    ranks: set[int] = set()
    for module, roles in modules.items():
        if "alpha" in roles:
            alphas[module] = _scalar(roles["alpha"].stored, label)
        if tensor := roles.get("lora_A.weight"):
            rank, configured = (*tensor.stored.info.shape, 0)[0] or 1, settings.get(tensor.component)
            if configured and rank not in configured.ranks_of(tensor.module):
                expected = format_list(map(str, configured.ranks_of(tensor.module)))
                raise SourceError(f"{label}: {tensor.module} has rank {rank}, but its {METADATA} says {expected}")
            ranks |= {rank} if not (tensor.flattened or configured or module in alphas) else set()
            scales[module] = (
                configured.scale(tensor.module, rank) if configured else (alphas.get(module) or rank) / rank
            )
        tensors |= dict(_renamed_tensors(module, roles))
    if len(ranks) > 1:
        hint = "save it with diffusers 0.35 or newer, which writes the configuration, or with alpha tensors"
        text = f"{label}: its modules have ranks {format_list(map(str, sorted(ranks)))}, but the file has no scales"
        raise SourceError(text, hint=hint)
    return ConvertedAdapter(tensors, scales, LYCORIS, {"alphas": alphas}, notes)


def _scalar(stored: StoredTensor, label: str) -> float:
    """Read a tensor of one number."""
    if stored.info.numel != 1:
        raise SourceError(f"{label}: {stored.info.name!r} is {list(stored.info.shape)}, not one number")
    return float(stored.read_float64().sum())


def _renamed_tensors(module: str, roles: Mapping[str, NamedTensor]) -> Iterator[tuple[str, StoredTensor]]:
    for role, tensor in roles.items():
        if role == "alpha":
            continue
        leaf = "lora_magnitude_vector" if role == "dora_scale" and "lora_A.weight" in roles else role
        yield f"{module}.{leaf}", replace(tensor.stored, info=tensor.stored.info.renamed(f"{module}.{leaf}"))
