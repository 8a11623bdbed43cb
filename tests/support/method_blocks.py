"""Methods run on tensors in memory, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeforge.methods import METHODS, Block
from mergeforge.methods.block_statistics import BlockStatistics

FIRST_BLOCK = Block("w", 0, 0)


@dataclass(frozen=True)
class InMemoryScan:
    """A BlockScan over whole tensors that are already in memory, in blocks of `size` elements."""

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
        """Copies, as a method may overwrite them."""
        values = [whole.flatten()[start : start + self.size].clone().view(-1, 1) for whole in self.inputs]
        return values, Block(self.name, start, self.seed)

    def __call__(self, visit: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        for start in self.starts(sample):
            yield visit(*self.block(start))


def statistics(inputs: list[Tensor], size: int = 1 << 19, seed: int = 0, name: str = "w") -> BlockStatistics:
    """Statistics of whole tensors in memory, from blocks of `size` elements."""
    scan = InMemoryScan(inputs, size, seed, name)
    return of_scan(scan, inputs[0].numel(), len(inputs), Block(name, 0, seed))


def of_scan(
    scan: Any,
    numel: int,
    input_count: int = 2,
    first_block: Block = FIRST_BLOCK,
) -> BlockStatistics:
    """Statistics that a scan collects."""
    return BlockStatistics(scan, numel, input_count, first_block)


def combine(
    method: str, inputs: list[Any], *, size: int = 1 << 19, seed: int = 0, name: str = "w", **parameters: Any
) -> Tensor:
    """Merge whole tensors with a method, block by block; parameters not passed take their defaults."""
    tensors = [
        torch.as_tensor(values, dtype=torch.float32) if not isinstance(values, Tensor) else values for values in inputs
    ]
    entry = METHODS[method]
    values: dict[str, Any] = {}
    for parameter in entry.parameters.values():
        value = parameters.get(parameter.name, parameters.get(parameter.name + "_", parameter.default))
        if parameter.per_input and not isinstance(value, list):
            value = [value] * len(tensors)
        values[parameter.name] = value
    entry.check_parameters(values)
    scan = InMemoryScan(tensors, size, seed, name)
    compute = "F64" if tensors[0].dtype == torch.float64 else "F32"
    known = BlockStatistics(scan, tensors[0].numel(), len(tensors), Block(name, 0, seed), compute)
    prepared = entry.prepare(known, values)
    merged = []
    for start in scan.starts():
        blocks, block = scan.block(start)
        merged.append(entry.merge_block(blocks, prepared, block, values).flatten())
    return torch.cat(merged).view(tensors[0].shape) if merged else tensors[0].clone()
