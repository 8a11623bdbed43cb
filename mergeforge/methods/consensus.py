"""How task vectors are added up: plainly, or only where they agree in sign (TIES)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def combined(inputs: list[Tensor], factors: list[float]) -> Tensor:
    """sum(factor_i * input_i), overwriting the first input."""
    total = inputs[0].mul_(factors[0])
    for one, factor in zip(inputs[1:], factors[1:], strict=True):
        total.add_(one, alpha=factor)
    return total


def weighted_sum(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float = 1.0, ratios: list[float] | None = None
) -> Tensor:
    """lambda * sum(ratio_i * weight_i * delta_i), overwriting the first delta; normalize divides by sum(weight_i).

    A sum of weights below 1e-8 divides by 1, as in mergekit's generalized task arithmetic. Each product is rounded
    before it is added, and lambda comes last, as there: the sums are equal, bit for bit. With ratios (random masks are
    nobody else's) all is one factor, added in one pass.
    """
    divisor = float(deltas[0].new_tensor(weight).sum()) if normalize else 1.0
    divisor = divisor if abs(divisor) >= 1e-8 else 1.0
    if ratios and any(ratio != 1 for ratio in ratios):
        return combined(deltas, [lambda_ / divisor * one for one in _factors(weight, ratios)])
    for delta, one in zip(deltas, weight, strict=True):
        if one != 1:
            delta.mul_(one)
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    if normalize:
        total.div_(divisor)
    return total if lambda_ == 1 else total.mul_(lambda_)


def agreeing_sum(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float = 1.0, ratios: list[float] | None = None
) -> Tensor:
    """Weighted sum of only those elements that have the elected sign; overwrites the deltas.

    TIES (https://arxiv.org/abs/2306.01708), elect and disjoint merge: at each element the sign of
    the weighted sum wins (zero: plus); normalize divides by the weights of those that agree.
    Written with float arithmetic only: torch's boolean operations are 5-30 times slower on a CPU.
    """
    for delta, factor in zip(deltas, _factors(weight, ratios), strict=True):
        if factor != 1:
            delta.mul_(factor)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    sign = total.ge_(0).mul_(2).sub_(1)
    result = sign.new_zeros(sign.shape)
    divisor = sign.new_zeros(sign.shape) if normalize else None
    for delta, one in zip(deltas, weight, strict=True):
        agreeing = delta.mul_(sign).relu_()  # |delta| where its sign is the elected one, else 0
        result.add_(agreeing)
        if divisor is not None:
            divisor.add_(agreeing.sign_(), alpha=one)
    if divisor is not None:
        result.div_(divisor.add_(divisor.clone().eq_(0)))  # nobody agrees: divide by 1
    return result.mul_(sign if lambda_ == 1 else sign.mul_(lambda_))


def _factors(weight: list[float], ratios: list[float] | None) -> list[float]:
    """The ratios restore the mass of what was kept of each delta."""
    return [one * ratio for one, ratio in zip(weight, ratios, strict=True)] if ratios else weight
