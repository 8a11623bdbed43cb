"""How task vectors are added up: plainly, or only where they agree in sign (TIES)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import dtype_name
from mergeforge.native import bindings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeforge.methods._random_mask import Drawing

    Integers = NDArray[np.int64]

LEAST = 1e-8  # of a sum of weights that is divided by


@dataclass(frozen=True)
class WeightedSum:
    """scale * sum(factor_i * input_i), divided by the sum of the factors with `normalize`.

    `elected`: weights; only terms that have the elected sign (agreeing_sum) are added up, and `normalize` divides by
    the weights of these. of() does not know them.

    `kept`: of each input only elements that are drawn at random; `bands`: only those whose magnitudes lie in bands
    (Bands.table), which count off ties as elements pass; of() is given inputs without the others. `near`: two
    inputs have shares of their own at each element, as nearswap defines them, instead of the factors.

    `fused`: each product after the first is added in one rounding (a fused multiply-add); else it is rounded first.
    A sum of factors below `least` divides by 1.
    """

    factors: Sequence[float]
    normalize: bool = False
    scale: float = 1.0
    fused: bool = False
    least: float = 0.0
    kept: Sequence[Drawing] = ()
    bands: Integers | None = None
    near: float | None = None
    elected: Sequence[float] = ()

    def divisor(self, compute: str) -> float:
        """The sum of the factors, one after the other, in the dtype that is computed in ("F32" or "F64")."""
        import numpy as np

        if not self.normalize:
            return 1.0
        factors = np.array(self.factors, np.float64 if compute == "F64" else np.float32)
        total = float(np.add.accumulate(factors)[-1])
        return total if abs(total) >= self.least else 1.0

    def of(self, inputs: list[Tensor]) -> Tensor:
        """The sum, overwriting the inputs."""
        total = _scaled(inputs[0], self.factors[0])
        for one, factor in zip(inputs[1:], self.factors[1:], strict=True):
            if self.fused:
                total.add_(one, alpha=factor)
            else:
                total.add_(_scaled(one, factor))
        divisor = self.divisor(dtype_name(total.dtype))
        if divisor != 1:
            total.div_(divisor)
        return _scaled(total, self.scale)


def _scaled(one: Tensor, factor: float) -> Tensor:
    return one if factor == 1 else one.mul_(factor)


def combined(inputs: list[Tensor], factors: Sequence[float]) -> Tensor:
    """sum(factor_i * input_i) with fused multiply-adds, overwriting the first input."""
    return WeightedSum(factors, fused=True).of(inputs)


def task_arithmetic_sum(
    weight: list[float], normalize: bool, lambda_: float, ratios: Sequence[float] = (), compute: str = "F32"
) -> WeightedSum:
    """lambda * sum(ratio_i * weight_i * delta_i); normalize divides by sum(weight_i).

    A sum of weights below 1e-8 divides by 1, as in mergekit's generalized task arithmetic. Each product is rounded
    before it is added, and lambda comes last, as there: the sums are equal, bit for bit. With ratios (random masks are
    nobody else's) all is one factor in what is computed in ("F32" or "F64"), added in one pass.
    """
    plain = WeightedSum(weight, normalize, lambda_, least=LEAST)
    if all(ratio == 1 for ratio in ratios):
        return plain
    share = lambda_ / plain.divisor(compute)
    return WeightedSum([share * one for one in _factors(weight, ratios)], fused=True)


def weighted_sum(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float = 1.0, ratios: Sequence[float] = ()
) -> Tensor:
    """task_arithmetic_sum, overwriting the deltas."""
    return task_arithmetic_sum(weight, normalize, lambda_, ratios, dtype_name(deltas[0].dtype)).of(deltas)


def agreeing_sum(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float = 1.0, ratios: list[float] | None = None
) -> Tensor:
    """Weighted sum of only those elements that have the elected sign; overwrites the deltas.

    TIES (https://arxiv.org/abs/2306.01708), elect and disjoint merge: at each element the sign of
    the weighted sum wins (zero: plus); normalize divides by the weights of those that agree.
    By a kernel in C, or with float arithmetic only: torch's boolean operations are 5-30 times slower on a CPU.
    """
    if bindings.is_supported(*deltas):
        return _agreeing_in_c(deltas, weight, normalize, lambda_, ratios)
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


def agreeing_terms(weight: list[float], normalize: bool, lambda_: float, ratios: Sequence[float]) -> WeightedSum:
    """agreeing_sum, for kernels."""
    return WeightedSum(_factors(weight, ratios), normalize, lambda_, elected=weight)


def _agreeing_in_c(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float, ratios: list[float] | None
) -> Tensor:
    import numpy as np

    factors, weights = (np.array(one, np.float32) for one in (_factors(weight, ratios), weight))
    length = deltas[0].numel()
    bindings.kernels().agreeing_sum(
        bindings.data_pointers(deltas), len(deltas), factors, weights, normalize, lambda_, length
    )
    return deltas[0]


def _factors(weight: Sequence[float], ratios: Sequence[float] | None) -> Sequence[float]:
    """The ratios restore the mass of what was kept of each delta."""
    return [one * ratio for one, ratio in zip(weight, ratios, strict=True)] if ratios else weight
