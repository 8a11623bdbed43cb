"""Reduction: what a merge does with one tensor's inputs, as data.

    base + scale * combine(factor_i * keep(input_i - base)) / divisor

Most methods are reductions: sums, interpolations, everything that adds up task vectors. A reduction is computed either
in C (native/reductions.c), from the inputs' bytes to the result, or by evaluate() in torch on any device; the plan
decides which. Both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import dtype_name
from mergeforge.methods.keep import Keep, KeepWhole

if TYPE_CHECKING:
    from torch import Tensor

    from mergeforge.methods.block import Block

MIN_DISTANCE = 1e-6  # nearswap


class Combine(IntEnum):
    """How the products of factors and kept inputs become one number; the values are those of reductions.h."""

    SUM = 0
    CONSENSUS_SUM = 1  # the sum of those that have the elected sign
    CONSENSUS_MEAN = 2  # the mean of those that have the elected sign, weighted by the factors
    NEARSWAP = 3  # two inputs, interpolated at each element by their distance


@dataclass(frozen=True)
class Reduction:
    """scale * combine(factor_i * keep(input_i)), divided with `normalize`.

    The sign that the sum of the products has at an element is elected there (zero: plus).

    `normalize` divides a SUM by the sum of the factors (less than `min_divisor` counts as 1), a CONSENSUS_SUM at each
    element by the sum of the `weights` of the terms that agree (0 counts as 1). A CONSENSUS_MEAN is always divided by
    the factors of the terms that agree, by `min_divisor` at least.

    `fused`: each product of a SUM after the first is added in one rounding (a fused multiply-add); else it is rounded
    first. `t`: the distance within which nearswap takes the second input.
    """

    factors: Sequence[float]
    combine: Combine = Combine.SUM
    keep: Keep = field(default_factory=KeepWhole)
    weights: Sequence[float] = ()
    normalize: bool = False
    scale: float = 1.0
    fused: bool = False
    min_divisor: float = 0.0
    t: float = 0.0

    def divisor(self, compute: str) -> float:
        """What a SUM is divided by: the factors added up one by one in the dtype of the computation ("F32", "F64")."""
        import numpy as np

        if not self.normalize or self.combine != Combine.SUM:
            return 1.0
        factors = np.array(self.factors, np.float64 if compute == "F64" else np.float32)
        total = float(np.add.accumulate(factors)[-1])
        return total if abs(total) >= self.min_divisor else 1.0

    def evaluate(self, inputs: list[Tensor], block: Block) -> Tensor:
        """Compute a block in torch; overwrites the inputs."""
        self.keep.drop(inputs, block)
        match self.combine:
            case Combine.SUM:
                return self._sum(inputs)
            case Combine.CONSENSUS_SUM:
                return self._consensus_sum(inputs)
            case Combine.CONSENSUS_MEAN:
                return self._consensus_mean(inputs)
            case Combine.NEARSWAP:
                return self._nearswap(*inputs)

    def _sum(self, inputs: list[Tensor]) -> Tensor:
        total = _scaled(inputs[0], self.factors[0])
        for tensor, factor in zip(inputs[1:], self.factors[1:], strict=True):
            if self.fused:
                total.add_(tensor, alpha=factor)
            else:
                total.add_(_scaled(tensor, factor))
        divisor = self.divisor(dtype_name(total.dtype))
        if divisor != 1:
            total.div_(divisor)
        return _scaled(total, self.scale)

    # Float arithmetic only: torch's boolean operations are 5-30 times slower on a CPU.

    def _consensus_sum(self, inputs: list[Tensor]) -> Tensor:
        """TIES (https://arxiv.org/abs/2306.01708), elect and disjoint merge."""
        for tensor, factor in zip(inputs, self.factors, strict=True):
            _scaled(tensor, factor)
        sign = _elected_sign(inputs)
        result = sign.new_zeros(sign.shape)
        divisor = sign.new_zeros(sign.shape) if self.normalize else None
        for tensor, weight in zip(inputs, self.weights, strict=True):
            agreeing = tensor.mul_(sign).relu_()  # the magnitude where the sign is the elected one, else 0
            result.add_(agreeing)
            if divisor is not None:
                divisor.add_(agreeing.sign_(), alpha=weight)
        if divisor is not None:
            result.div_(divisor.add_(divisor.clone().eq_(0)))  # none agrees: divide by 1
        return result.mul_(sign if self.scale == 1 else sign.mul_(self.scale))

    def _consensus_mean(self, inputs: list[Tensor]) -> Tensor:
        import torch

        sign = _elected_sign(inputs)
        result, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for tensor, factor in zip(inputs, self.factors, strict=True):
            agreeing = tensor.mul_(sign).relu_()
            result.add_(agreeing, alpha=factor)
            divisor.add_(agreeing.sign_(), alpha=factor)
        return result.mul_(sign).div_(divisor.clamp_(min=self.min_divisor))

    def _nearswap(self, first: Tensor, second: Tensor) -> Tensor:
        share = (first - second).abs_().clamp_(min=MIN_DISTANCE)
        share = share.reciprocal_().mul_(self.t).clamp_(max=1)
        second.mul_(share)
        return share.neg_().add_(1).mul_(first).add_(second)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.mul_(factor)


def _elected_sign(inputs: list[Tensor]) -> Tensor:
    """1 where the sum of the inputs is not negative, else -1."""
    total = inputs[0].clone()
    for tensor in inputs[1:]:
        total.add_(tensor)
    return total.ge_(0).mul_(2).sub_(1)
