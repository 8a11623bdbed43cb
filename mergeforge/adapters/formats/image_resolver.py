"""Find the module of an image model that a tensor of an adapter changes."""

from __future__ import annotations

from dataclasses import dataclass

from mergeforge.adapters.formats.image_model import COMPONENTS, Component, components_of
from mergeforge.adapters.peft.hf_renames import LoadedSlice
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.model import ModelSource
from mergeforge.errors import SourceError, format_list
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor


@dataclass(frozen=True)
class NamedTensor:
    """A tensor, its component, its module's path there, and its role; `flattened`: the path has '_' for '.'."""

    component: str
    module: str
    role: str
    stored: StoredTensor
    flattened: bool


class ModuleResolver:
    """Finds the base's module for a path of these formats.

    `aliases`: modules that it found inside another weight, or in pieces: path -> rows of stored weights.
    """

    def __init__(self, label: str, base: ModelSource) -> None:
        self.label = label
        self.base = base
        self.resolver = TensorResolver(label, base, {})
        self.components = components_of(base)
        self.aliases: dict[str, tuple[LoadedSlice, ...]] = {}
        self.cache: dict[tuple[str, str], str] = {}
        self.suffixes: dict[str, list[str]] = {}
        for module in dict.fromkeys(name.rpartition(".")[0] for name in base.tensors if "" in self.components):
            words = module.split(".")
            for start in range(1, len(words)):
                self.suffixes.setdefault("_".join(words[start:]), []).append(module)

    def find(self, tensor: NamedTensor) -> str:
        """The module's path in the base, or its name in `aliases`; "" if the base does not have it."""
        key = (tensor.component, tensor.module)
        if key not in self.cache:
            self.cache[key] = self._find(tensor)
        return self.cache[key]

    def weight(self, tensor: NamedTensor) -> LazyTensor | None:
        """The stored weight of the tensor's module, if it is one."""
        name = self.resolver.find(f"{path}.weight") if (path := self.find(tensor)) and ":" not in path else ""
        return self.base.tensors.get(name)

    def _find(self, tensor: NamedTensor) -> str:
        found = {}
        for name, component in self._components(tensor.component).items():
            for module in self._modules(component, tensor):
                found[self._path(name, component, module)] = module
        if len(found) > 1:
            text = f"{tensor.stored.info.name!r} is ambiguous in {self.base.label}"
            raise SourceError(f"{self.label}: {text}: it matches {format_list(found)}")
        if not found and not tensor.flattened and self.resolver.find(f"{tensor.module}.weight"):
            return tensor.module if "" in self.components else ""
        return next(iter(found), "")

    def _components(self, name: str) -> dict[str, Component]:
        """The components that an adapter's component can be."""
        canonical = COMPONENTS.get(name, "")
        if "" in self.components or not canonical:
            return self.components
        return {canonical: self.components[canonical]} if canonical in self.components else {}

    def _modules(self, component: Component, tensor: NamedTensor) -> list[str]:
        if not tensor.flattened:
            return [tensor.module] if tensor.module in component.modules or tensor.module in component.slices else []
        return component.flattened.get(tensor.module) or self.suffixes.get(tensor.module, [])

    def _path(self, name: str, component: Component, module: str) -> str:
        if module not in component.slices:
            return component.modules.get(module, module)
        (first, *more) = slices = component.slices[module]
        is_whole = not more and first.rows == self.base.tensors[first.name].info.shape[0]
        if is_whole and first.name.endswith(".weight"):
            return first.name.removesuffix(".weight")
        path = f"{name or 'model'}:{module}"
        self.aliases[f"{path}.weight"] = slices
        return path


def without_other_encoders(known: list[str], named: list[NamedTensor], resolver: ModuleResolver) -> list[str]:
    """The components without text encoders that the base, a single text encoder, is not. Raises SourceError."""
    encoders = [name for name in known if COMPONENTS.get(name, "").startswith("text_encoder")]
    if "" not in resolver.components or len(encoders) < 2:
        return known
    base = resolver.base
    is_second = "CLIPTextModelWithProjection" in (base.config.get("architectures") or ())
    fitting = [name for name in encoders if _fits(name, named, resolver)]
    if len(fitting) > 1:
        own = base.folder.name if base.folder.name.startswith("text_encoder") else f"text_encoder{'_2' * is_second}"
        fitting = [name for name in fitting if COMPONENTS[name] == own]
    return [name for name in known if name not in encoders or name in fitting[:1]]


def _fits(component: str, named: list[NamedTensor], resolver: ModuleResolver) -> bool:
    """Whether the factors of a component have the sizes of the base's weights."""
    for tensor in named:
        if tensor.component == component and tensor.role == "lora_A.weight" and (weight := resolver.weight(tensor)):
            return bool(tensor.stored.info.columns == weight.info.columns)
    return True
