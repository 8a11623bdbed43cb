"""What a method sees of the engine: inputs cut into blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeforge.methods import METHODS, Block


@dataclass(frozen=True)
class Looking:
    """The engine's `look` over whole tensors that are already in memory."""

    inputs: list[Tensor]
    size: int
    seed: int = 0
    name: str = "w"

    def starts(self, sample: int = 0) -> list[int]:
        starts = range(0, self.inputs[0].numel(), self.size)
        if not sample:
            return list(starts)
        return sorted({starts[at * (len(starts) - 1) // max(sample - 1, 1)] for at in range(sample)})

    def block(self, start: int) -> tuple[list[Tensor], Block]:
        """Copies, as the engine's are: a method may overwrite them."""
        values = [one.flatten()[start : start + self.size].clone().view(-1, 1) for one in self.inputs]
        return values, Block(self.name, start, self.seed)

    def __call__(self, see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        for start in self.starts(sample):
            yield see(*self.block(start))


def combine(
    method: str, inputs: list[Any], *, size: int = 1 << 19, seed: int = 0, name: str = "w", **parameters: Any
) -> Tensor:
    """A method on whole tensors, block by block; parameters that are not given take their defaults."""
    tensors = [torch.as_tensor(one, dtype=torch.float32) if not isinstance(one, Tensor) else one for one in inputs]
    known = METHODS[method]
    values: dict[str, Any] = {}
    for parameter in known.parameters.values():
        value = parameters.get(parameter.name, parameters.get(parameter.name + "_", parameter.default))
        if parameter.per_input and not isinstance(value, list):
            value = [value] * len(tensors)
        values[parameter.name] = value
    known.check_parameters(values)
    looking = Looking(tensors, size, seed, name)
    facts = known.learn(looking, tensors[0].numel(), values)
    merged = []
    for start in looking.starts():
        blocks, block = looking.block(start)
        merged.append(known(blocks, facts, block, values).flatten())
    return torch.cat(merged).view(tensors[0].shape) if merged else tensors[0].clone()
