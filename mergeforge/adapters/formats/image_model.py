"""The components of an image model's checkpoint (UNet or transformer, text encoders), and every name of their modules.

A single-file checkpoint holds them all, each under its prefix; a folder of diffusers holds one. Adapters name a
component, and its modules as diffusers, the original or a trainer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mergeforge.adapters.formats.clip_names import clip_aliases
from mergeforge.adapters.formats.flux_names import flux_aliases
from mergeforge.adapters.formats.ldm_names import diffusers_names, ldm_names
from mergeforge.adapters.peft.hf_renames import LoadedSlice
from mergeforge.checkpoints.model import ModelSource
from mergeforge.tensors.lazy import LazyTensor

Slices = tuple[LoadedSlice, ...]
DENOISER = "denoiser"
# What adapters call a component; kohya's lora_te is the only text encoder of Stable Diffusion 1 and 2.
COMPONENTS = {
    **dict.fromkeys(("unet", "transformer", "diffusion_model", "prior"), DENOISER),
    **dict.fromkeys(("lora_unet", "lora_transformer", "lora_prior_unet"), DENOISER),
    **dict.fromkeys(("text_encoder", "lora_te", "lora_te1", "lora_prior_te"), "text_encoder"),
    **dict.fromkeys(("text_encoder_2", "lora_te2"), "text_encoder_2"),
    **dict.fromkeys(("text_encoder_3", "lora_te3"), "text_encoder_3"),
}
# Where single files hold the components. SDXL's refiner has the second encoder alone, as its first embedder.
_PREFIXES = {
    "model.diffusion_model.": DENOISER,
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}


@dataclass(frozen=True)
class Component:
    """One component: its tensors by their names within it."""

    prefix: str
    tensors: Mapping[str, LazyTensor]
    layers_per_block: int = 2

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module, in any layout's name, that is stored as one weight -> the stored module's path in the checkpoint."""
        own = dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)
        names = {module: module for module in own}
        names |= ldm_names(own, self.layers_per_block) | diffusers_names(own)
        if "text_model" not in {module.split(".")[0] for module in own}:  # transformers 5 has no such level in memory
            names |= {
                f"text_model.{module}": module for module in own if module.startswith(("encoder.layers.", "final_"))
            }
        return {name: self.prefix + module for name, module in names.items()}

    @cached_property
    def slices(self) -> dict[str, Slices]:
        """Module, in another layout's name, that is stored under another name or inside another weight -> its rows."""
        weights = {name[: -len(".weight")]: tensor for name, tensor in self.tensors.items() if name.endswith(".weight")}
        aliases = {**flux_aliases(weights), **clip_aliases(self.tensors)}
        return {name: slices for name, slices in aliases.items() if name not in self.modules}

    @cached_property
    def flattened(self) -> dict[str, list[str]]:
        """A name with '_' for '.' -> the modules that it can mean."""
        names: dict[str, list[str]] = {}
        for module in (*self.modules, *self.slices):
            names.setdefault(module.replace(".", "_"), []).append(module)
        return names


def components_of(base: ModelSource) -> dict[str, Component]:
    """The components of a single-file checkpoint by name; one without a name if the base is a single model."""
    layers_per_block = int(base.config.get("layers_per_block") or 2)
    parts: dict[tuple[str, str], dict[str, LazyTensor]] = {}
    for name, tensor in base.tensors.items():
        for prefix, component in _PREFIXES.items():
            if name.startswith(prefix):
                parts.setdefault((component, prefix), {})[name.removeprefix(prefix)] = tensor
    found = {name: Component(prefix, tensors, layers_per_block) for (name, prefix), tensors in parts.items()}
    if "text_encoder_3" in found and "text_encoder_2" not in found:
        found["text_encoder_2"] = found["text_encoder_3"]  # Flux has T5 as its second text encoder
    return found or {"": Component("", base.tensors, layers_per_block)}
