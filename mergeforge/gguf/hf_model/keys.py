"""The keys of a GGUF file, as the rules that rebuild a config read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.gguf.hf_model.shapes import Shape
from mergeforge.gguf.key_values import Value

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ModelKeys:
    """Key/values of one architecture, the shapes of the tensors, and a function that reads a small F32 tensor."""

    arch: str
    values: Mapping[str, Value]
    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]

    def get(self, name: str) -> Any:
        """The value of a key of the architecture (without prefix) or a full key; None if it is absent.

        Numbers are the shortest decimals of their float32 (1e-05), arrays are lists.
        """
        value = self.values.get(f"{self.arch}.{name}", self.values.get(name))
        if value is None:
            return None
        if value.kind == "array":
            return [_plain(item, value.items) for item in value.value]
        return _plain(value.value, value.kind)


def _plain(value: Any, kind: str) -> Any:
    if kind == "f32":
        import numpy as np

        return float(str(np.float32(value)))
    return bool(value) if kind == "bool" else value
