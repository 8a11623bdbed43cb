"""Single files of image models' adapters, whose components (UNet, text encoders) are models of their own.

kohya and LyCORIS write `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`, with '_' for '.' in
the module's path, or in that of the original UNet; diffusers writes
`unet.down_blocks.0.attentions.0.proj_in.lora_A.weight`, or older names. The scale is alpha / r, with a tensor
`alpha` beside the factors (none: 1), or from diffusers' metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.adapters.formats import Translated
from mergeforge.adapters.formats.ldm_names import ldm_names
from mergeforge.adapters.peft.kinds.lycoris import LYCORIS
from mergeforge.adapters.peft.lora_config import LoraSettings, read_settings
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.checkpoint import ModelSource
from mergeforge.errors import SourceError, listing
from mergeforge.tensors.stored import StoredTensor

METADATA = "lora_adapter_metadata"
# suffix -> the same in keys.py's names
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
    **{f"hada_{one}": f"hada_{one}" for one in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{one}": f"lokr_{one}" for one in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_KOHYA = re.compile(r"(lora_(?:te\d?|unet|transformer|prior_unet|prior_te)|lycoris|lora)_(.+)")
_COMPONENTS = re.compile(r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|diffusion_model)\.(.+)")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class _Spoken:
    """One tensor: the component that it is for, the module's path there, its role; `flat`: '_' stands for '.'."""

    component: str
    module: str
    role: str
    stored: StoredTensor
    flat: bool


def read_diffusion(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], label: str, base: ModelSource
) -> Translated:
    """The tensors that are for the base, and the scale of every module.

    A component of which the base has nothing, while it has all of another, is another model's: it is left
    out, and a note says so. Raises SourceError for names or settings whose meaning is unknown.
    """
    spoken = [_spoken(name, stored, label) for name, stored in tensors.items()]
    homes = _Homes(label, base)
    components = dict.fromkeys(one.component for one in spoken)
    known = [one for one in components if any(homes.find(each) for each in spoken if each.component == one)]
    kept = [one for one in spoken if one.component in known]
    if not kept:
        near = listing(dict.fromkeys(one.stored.info.name for one in spoken), 3)
        raise SourceError(f"{label}: {base.label} has none of its modules ({near})", hint="it is for another model")
    if strangers := list(dict.fromkeys(one.stored.info.name for one in kept if one.flat and not homes.find(one))):
        raise SourceError(
            f"{label}: {listing(strangers)} match no tensor of {base.label}", hint="it is for another model"
        )
    notes = [_left_out(one, spoken, label, base) for one in components if one not in known]
    modules: dict[str, dict[str, _Spoken]] = {}
    for one in kept:
        roles = modules.setdefault(homes.find(one) or one.module, {})
        if one.role in roles:
            raise SourceError(f"{label}: {one.stored.info.name!r} says again what another tensor says")
        roles[one.role] = one
    return _translated(modules, _settings(metadata, known, label), label, tuple(notes))


def _spoken(name: str, stored: StoredTensor, label: str) -> _Spoken:
    if old := _PROCESSOR.fullmatch(name):
        leaf = "to_out.0" if old[2] == "to_out" else old[2]
        name = f"{old[1]}.{leaf}.lora_{old[3]}.weight"
    suffix = next((one for one in _ROLES if name.endswith("." + one)), None)
    if suffix is None:
        raise SourceError(f"{label}: the meaning of its tensor {name!r} is unknown", hint="is it a LoRA, LoHa or LoKr?")
    path = name[: -len(suffix) - 1]
    flat = _KOHYA.fullmatch(path) if "." not in path else None
    found = flat or _COMPONENTS.fullmatch(path)
    component, module = (found[1], found[2]) if found else ("", path)
    return _Spoken(component, module, _ROLES[suffix], stored, flat is not None)


class _Homes:
    """The base's modules by the dialect's paths."""

    def __init__(self, label: str, base: ModelSource) -> None:
        self.label = label
        self.base = base
        self.homes = TensorResolver(label, base, {})
        self.flat: dict[str, list[str]] = {}
        self.found: dict[str, str] = {}
        modules = dict.fromkeys(name.rpartition(".")[0] for name in base.tensors)
        self.originals = ldm_names(modules, int(base.config.get("layers_per_block") or 2))
        for module in modules:
            pieces = module.split(".")
            for start in range(len(pieces)):
                self.flat.setdefault("_".join(pieces[start:]), []).append(module)
        for name, module in self.originals.items():
            self.flat.setdefault(name.replace(".", "_"), [module])

    def find(self, one: _Spoken) -> str:
        """The module's path in the base; "" for none."""
        if not one.flat and one.module not in self.found:
            held = self.homes.find(f"{one.module}.weight")
            self.found[one.module] = one.module if held else self.originals.get(one.module, "")
        if not one.flat:
            return self.found[one.module]
        found = self.flat.get(one.module, [])
        exact = [module for module in found if module.replace(".", "_") == one.module]
        if len(exact or found) > 1:
            text = f"{one.stored.info.name!r} may mean any of {listing(exact or found)} of {self.base.label}"
            raise SourceError(f"{self.label}: {text}")
        return (exact or found or [""])[0]


def _left_out(component: str, spoken: list[_Spoken], label: str, base: ModelSource) -> str:
    count = sum(one.component == component for one in spoken)
    return (
        f"{label}: its {count} tensors for {component or 'another model'} are left out: {base.label} has none of them"
    )


def _settings(metadata: Mapping[str, str], components: list[str], label: str) -> dict[str, LoraSettings]:
    """diffusers' LoRA configuration of each component, from the file's metadata."""
    if METADATA not in metadata:
        return {}
    try:
        given: Any = json.loads(metadata[METADATA])
        parts = {one: _of_component(given, one) for one in components}
        if silent := [one for one in components if not parts[one]]:
            raise ValueError(f"it says nothing of {silent[0] or 'tensors without a component'}")
        found = {one: read_settings(config) for one, config in parts.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{label}: its {METADATA}: {error}") from None
    if started := next((settings.start for settings in found.values() if settings.start), ""):
        raise SourceError(f"{label}: its {METADATA} says init_lora_weights: {started}, which is not supported there")
    return found


def _of_component(given: Mapping[str, Any], component: str) -> dict[str, Any]:
    """A component's part of the metadata: under its name, or all of it where the file is one model's own."""
    own = f"{component}." if component else ""
    return {
        key[len(own) :]: value for key, value in given.items() if key.startswith(own) and "." not in key[len(own) :]
    }


def _translated(
    modules: Mapping[str, Mapping[str, _Spoken]],
    settings: Mapping[str, LoraSettings],
    label: str,
    notes: tuple[str, ...],
) -> Translated:
    tensors: dict[str, StoredTensor] = {}
    scales: dict[str, float] = {}
    alphas: dict[str, float] = {}
    ranks: set[int] = set()
    for module, roles in modules.items():
        if "alpha" in roles:
            alphas[module] = _number(roles["alpha"].stored, label)
        if one := roles.get("lora_A.weight"):
            rank, said = (*one.stored.info.shape, 0)[0] or 1, settings.get(one.component)
            if said and rank not in said.ranks_of(one.module):
                raise SourceError(f"{label}: {one.module} has rank {rank}, its {METADATA} says otherwise")
            ranks |= {rank} if not (one.flat or said or module in alphas) else set()
            scales[module] = said.scale(one.module, rank) if said else (alphas.get(module) or rank) / rank
        tensors |= dict(_renamed(module, roles))
    if len(ranks) > 1:
        hint = "save it with diffusers 0.35 or newer, which writes its configuration, or with its alphas"
        text = f"{label}: its modules have ranks {listing(map(str, sorted(ranks)))}, and nothing says their scales"
        raise SourceError(text, hint=hint)
    return Translated(tensors, scales, LYCORIS, {"alphas": alphas}, notes)


def _number(stored: StoredTensor, label: str) -> float:
    """A tensor of one number."""
    if stored.info.numel != 1:
        raise SourceError(f"{label}: {stored.info.name!r} is {list(stored.info.shape)}, not one number")
    return float(stored.whole().sum())


def _renamed(module: str, roles: Mapping[str, _Spoken]) -> Iterator[tuple[str, StoredTensor]]:
    for role, one in roles.items():
        if role == "alpha":
            continue
        leaf = "lora_magnitude_vector" if role == "dora_scale" and "lora_A.weight" in roles else role
        yield f"{module}.{leaf}", replace(one.stored, info=one.stored.info.renamed(f"{module}.{leaf}"))
