"""How task vectors are added up: plainly, or only where they agree in sign (TIES)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(deltas: list[Tensor], weight: list[float], normalize: bool) -> Tensor:
    """sum(weight_i * delta_i), overwriting the first delta; normalize divides by sum(weight_i).

    A sum of weights below 1e-8 divides by 1, as in mergekit's generalized task arithmetic.
    """
    total = deltas[0].mul_(weight[0])
    for delta, one in zip(deltas[1:], weight[1:], strict=True):
        total.add_(delta.mul_(one))
    if normalize:
        divisor = float(total.new_tensor(weight).sum())
        total.div_(divisor if abs(divisor) >= 1e-8 else 1.0)
    return total


def agreeing_sum(deltas: list[Tensor], weight: list[float], normalize: bool) -> Tensor:
    """Weighted sum of only those elements that have the elected sign; overwrites the deltas.

    TIES (https://arxiv.org/abs/2306.01708), elect and disjoint merge: at each element the sign of
    the weighted sum wins (zero: plus); normalize divides by the weights of those that agree.
    Written with float arithmetic only: torch's boolean operations are 5-30 times slower on a CPU.
    """
    total = deltas[0].mul_(weight[0]).clone()
    for delta, one in zip(deltas[1:], weight[1:], strict=True):
        total.add_(delta.mul_(one))
    sign = total.ge_(0).mul_(2).sub_(1)
    result, divisor = sign.new_zeros(sign.shape), sign.new_zeros(sign.shape)
    for delta, one in zip(deltas, weight, strict=True):
        agreeing = delta.mul_(sign).relu_()  # |delta| where its sign is the elected one, else 0
        result.add_(agreeing)
        if normalize:
            divisor.add_(agreeing.sign_(), alpha=one)
    if normalize:
        result.div_(divisor.add_(divisor.clone().eq_(0)))  # nobody agrees: divide by 1
    return result.mul_(sign)
