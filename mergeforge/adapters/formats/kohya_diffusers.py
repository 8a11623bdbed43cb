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
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.adapters.formats import ConvertedAdapter
from mergeforge.adapters.formats.ldm_names import ldm_names
from mergeforge.adapters.peft.kinds.lycoris import LYCORIS
from mergeforge.adapters.peft.lora_config import LoraSettings, read_settings
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.model import ModelSource
from mergeforge.errors import SourceError, format_list
from mergeforge.tensors.stored import StoredTensor

METADATA = "lora_adapter_metadata"
# Suffix -> the suffix that peft/keys.py knows.
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
_COMPONENTS = re.compile(r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|diffusion_model)\.(.+)")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class _NamedTensor:
    """A tensor, its component, its module's path there, and its role; `flattened`: the path has '_' for '.'."""

    component: str
    module: str
    role: str
    stored: StoredTensor
    flattened: bool


def read_kohya_diffusers(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], label: str, base: ModelSource
) -> ConvertedAdapter:
    """Return the tensors that apply to the base, and the scale of every module.

    A component of which the base has no module belongs to another model: it is skipped with a note, as long as
    the base has all modules of another component. Raises SourceError for unknown names or settings.
    """
    named = [_parse_name(name, stored, label) for name, stored in tensors.items()]
    resolver = _ModuleResolver(label, base)
    components = dict.fromkeys(tensor.component for tensor in named)
    known = [name for name in components if any(resolver.find(tensor) for tensor in named if tensor.component == name)]
    relevant = [tensor for tensor in named if tensor.component in known]
    if not relevant:
        examples = format_list(dict.fromkeys(tensor.stored.info.name for tensor in named), 3)
        raise SourceError(f"{label}: {base.label} has none of its modules ({examples})", hint="it is for another model")
    unmatched = [tensor.stored.info.name for tensor in relevant if tensor.flattened and not resolver.find(tensor)]
    if unmatched:
        text = f"{label}: {format_list(dict.fromkeys(unmatched))} match no tensor of {base.label}"
        raise SourceError(text, hint="it is for another model")
    notes = [_skipped_note(name, named, label, base) for name in components if name not in known]
    modules: dict[str, dict[str, _NamedTensor]] = {}
    for tensor in relevant:
        roles = modules.setdefault(resolver.find(tensor) or tensor.module, {})
        if tensor.role in roles:
            first = roles[tensor.role].stored.info.name
            raise SourceError(f"{label}: {tensor.stored.info.name!r} duplicates {first!r}")
        roles[tensor.role] = tensor
    return _convert(modules, _metadata_settings(metadata, known, label), label, tuple(notes))


def _parse_name(name: str, stored: StoredTensor, label: str) -> _NamedTensor:
    if processor := _PROCESSOR.fullmatch(name):
        leaf = "to_out.0" if processor[2] == "to_out" else processor[2]
        name = f"{processor[1]}.{leaf}.lora_{processor[3]}.weight"
    suffix = next((ending for ending in _ROLES if name.endswith("." + ending)), None)
    if suffix is None:
        raise SourceError(f"{label}: unknown tensor {name!r}", hint="is it a LoRA, LoHa or LoKr adapter?")
    path = name[: -len(suffix) - 1]
    kohya = _KOHYA.fullmatch(path) if "." not in path else None
    parts = kohya or _COMPONENTS.fullmatch(path)
    component, module = (parts[1], parts[2]) if parts else ("", path)
    return _NamedTensor(component, module, _ROLES[suffix], stored, kohya is not None)


class _ModuleResolver:
    """Finds the base's module for a path of these formats."""

    def __init__(self, label: str, base: ModelSource) -> None:
        self.label = label
        self.base = base
        self.resolver = TensorResolver(label, base, {})
        self.flattened: dict[str, list[str]] = {}
        self.cache: dict[str, str] = {}
        modules = dict.fromkeys(name.rpartition(".")[0] for name in base.tensors)
        self.ldm_modules = ldm_names(modules, int(base.config.get("layers_per_block") or 2))
        for module in modules:
            words = module.split(".")
            for start in range(len(words)):
                self.flattened.setdefault("_".join(words[start:]), []).append(module)
        for name, module in self.ldm_modules.items():
            self.flattened.setdefault(name.replace(".", "_"), [module])

    def find(self, tensor: _NamedTensor) -> str:
        """The module's path in the base; "" if the base does not have it."""
        if not tensor.flattened and tensor.module not in self.cache:
            weight = self.resolver.find(f"{tensor.module}.weight")
            self.cache[tensor.module] = tensor.module if weight else self.ldm_modules.get(tensor.module, "")
        if not tensor.flattened:
            return self.cache[tensor.module]
        candidates = self.flattened.get(tensor.module, [])
        exact = [module for module in candidates if module.replace(".", "_") == tensor.module]
        if len(exact or candidates) > 1:
            text = f"{tensor.stored.info.name!r} is ambiguous in {self.base.label}"
            raise SourceError(f"{self.label}: {text}: it matches {format_list(exact or candidates)}")
        return (exact or candidates or [""])[0]


def _skipped_note(component: str, named: list[_NamedTensor], label: str, base: ModelSource) -> str:
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
    modules: Mapping[str, Mapping[str, _NamedTensor]],
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


def _renamed_tensors(module: str, roles: Mapping[str, _NamedTensor]) -> Iterator[tuple[str, StoredTensor]]:
    for role, tensor in roles.items():
        if role == "alpha":
            continue
        leaf = "lora_magnitude_vector" if role == "dora_scale" and "lora_A.weight" in roles else role
        yield f"{module}.{leaf}", replace(tensor.stored, info=tensor.stored.info.renamed(f"{module}.{leaf}"))
