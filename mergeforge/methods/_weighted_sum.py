"""Sums of task vectors: plain weighted sums, and sums of only those elements that agree in sign (TIES)."""

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

    from mergeforge.methods._random_mask import MaskKey

    Integers = NDArray[np.int64]

MIN_WEIGHT_SUM = 1e-8  # a smaller sum of weights divides by 1


@dataclass(frozen=True)
class WeightedSum:
    """scale * sum(factor_i * input_i), divided by the sum of the factors with `normalize`.

    The native library computes all of it; evaluate() computes it from the factors, `normalize`, `scale` and `fused`.

    `fused`: each product after the first is added in one rounding (a fused multiply-add); else it is rounded first.
    A sum of factors below `min_divisor` divides by 1.

    For the native library only:

    `election_weights`: only terms that have the elected sign (sign_consensus_sum) are added up, and `normalize`
    divides by these weights of the terms that are.
    `mask_keys`: only elements that a random mask keeps, one key for each input.
    `magnitude_ranges`: only elements whose magnitudes lie in the input's range (MagnitudeRanges.native_table, in which
    the library counts off ties).
    `nearswap_t`: two inputs are interpolated at each element as nearswap defines it, instead of by the factors.
    """

    factors: Sequence[float]
    normalize: bool = False
    scale: float = 1.0
    fused: bool = False
    min_divisor: float = 0.0
    mask_keys: Sequence[MaskKey] = ()
    magnitude_ranges: Integers | None = None
    nearswap_t: float | None = None
    election_weights: Sequence[float] = ()

    def divisor(self, compute: str) -> float:
        """The sum of the factors, one after the other, in the dtype of the computation ("F32" or "F64")."""
        import numpy as np

        if not self.normalize:
            return 1.0
        factors = np.array(self.factors, np.float64 if compute == "F64" else np.float32)
        total = float(np.add.accumulate(factors)[-1])
        return total if abs(total) >= self.min_divisor else 1.0

    def evaluate(self, inputs: list[Tensor]) -> Tensor:
        """Compute the sum in torch, overwriting the inputs.

        Raises NotImplementedError for a sum that only the native library computes.
        """
        if native_only := self._native_only():
            raise NotImplementedError(f"a weighted sum with {', '.join(native_only)} needs the native library")
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

    def _native_only(self) -> list[str]:
        """The fields in use that evaluate() does not compute."""
        in_use = {
            "mask_keys": len(self.mask_keys) > 0,
            "magnitude_ranges": self.magnitude_ranges is not None,
            "nearswap_t": self.nearswap_t is not None,
            "election_weights": len(self.election_weights) > 0,
        }
        return [name for name, used in in_use.items() if used]


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.mul_(factor)


def fused_weighted_sum(inputs: list[Tensor], factors: Sequence[float]) -> Tensor:
    """sum(factor_i * input_i) with fused multiply-adds, overwriting the first input."""
    return WeightedSum(factors, fused=True).evaluate(inputs)


def task_arithmetic_sum(
    weight: list[float], normalize: bool, lambda_: float, ratios: Sequence[float] = (), compute: str = "F32"
) -> WeightedSum:
    """lambda * sum(ratio_i * weight_i * delta_i); normalize divides by sum(weight_i).

    A sum of weights below 1e-8 divides by 1, as in mergekit's generalized task arithmetic. Each product is rounded
    before it is added, and lambda comes last, as there: the sums are equal, bit for bit. With ratios (only after
    random masks, which no other program draws) everything becomes one factor in the dtype of the computation ("F32"
    or "F64"), added in one pass.
    """
    plain = WeightedSum(weight, normalize, lambda_, min_divisor=MIN_WEIGHT_SUM)
    if all(ratio == 1 for ratio in ratios):
        return plain
    scale = lambda_ / plain.divisor(compute)
    return WeightedSum([scale * factor for factor in _factors(weight, ratios)], fused=True)


def weighted_sum(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float = 1.0, ratios: Sequence[float] = ()
) -> Tensor:
    """task_arithmetic_sum, evaluated; overwrites the deltas."""
    return task_arithmetic_sum(weight, normalize, lambda_, ratios, dtype_name(deltas[0].dtype)).evaluate(deltas)


def sign_consensus_sum(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float = 1.0, ratios: list[float] | None = None
) -> Tensor:
    """Weighted sum of only those elements that have the elected sign; overwrites the deltas.

    TIES (https://arxiv.org/abs/2306.01708), elect and disjoint merge: at each element the sign of
    the weighted sum wins (zero: plus); normalize divides by the weights of those that agree.
    Uses the native library, or float arithmetic only: torch's boolean operations are 5-30 times slower on a CPU.
    """
    if bindings.is_supported(*deltas):
        return _sign_consensus_native(deltas, weight, normalize, lambda_, ratios)
    for delta, factor in zip(deltas, _factors(weight, ratios), strict=True):
        if factor != 1:
            delta.mul_(factor)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    sign = total.ge_(0).mul_(2).sub_(1)
    result = sign.new_zeros(sign.shape)
    divisor = sign.new_zeros(sign.shape) if normalize else None
    for delta, input_weight in zip(deltas, weight, strict=True):
        agreeing = delta.mul_(sign).relu_()  # |delta| where its sign is the elected one, else 0
        result.add_(agreeing)
        if divisor is not None:
            divisor.add_(agreeing.sign_(), alpha=input_weight)
    if divisor is not None:
        result.div_(divisor.add_(divisor.clone().eq_(0)))  # no delta agrees: divide by 1
    return result.mul_(sign if lambda_ == 1 else sign.mul_(lambda_))


def sign_consensus_terms(weight: list[float], normalize: bool, lambda_: float, ratios: Sequence[float]) -> WeightedSum:
    """sign_consensus_sum, for the native library."""
    return WeightedSum(_factors(weight, ratios), normalize, lambda_, election_weights=weight)


def _sign_consensus_native(
    deltas: list[Tensor], weight: list[float], normalize: bool, lambda_: float, ratios: list[float] | None
) -> Tensor:
    import numpy as np

    factors, weights = (np.array(values, np.float32) for values in (_factors(weight, ratios), weight))
    length = deltas[0].numel()
    bindings.kernels().sign_consensus_sum(
        bindings.data_pointers(deltas), len(deltas), factors, weights, normalize, lambda_, length
    )
    return deltas[0]


def _factors(weight: Sequence[float], ratios: Sequence[float] | None) -> Sequence[float]:
    """The weights times the ratios that rescale what is kept of each delta."""
    return [factor * ratio for factor, ratio in zip(weight, ratios, strict=True)] if ratios else weight
