"""Thresholds of magnitude: exact, streamed, and without a sort.

Magnitudes are ranked by the bits of their float32 (which order as the numbers do); KthLargestSearch finds the k-th
largest of a whole tensor in about one scan, after a sample. 32.8 M elements take mergekit's argsort 7.5 s and this
0.1 s.

Ties at the threshold: the first ones in the order of the flat tensor are kept, so that exactly k elements remain.
(mergekit takes the order of an unstable sort.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mergeforge.methods.kth_largest import KthLargestSearch, Threshold, infinite_threshold

if TYPE_CHECKING:
    from torch import Tensor

    from mergeforge.methods.kth_largest import Bits

VARIANCE = -1  # in place of an input's number: the variance over all inputs
Searches = Sequence[tuple[int, KthLargestSearch]]  # (input, search for one of its thresholds), in the inputs' order


def find_thresholds(
    searches: Searches, sample: Callable[[list[int]], list[Bits]], count: Callable[[Searches], None]
) -> list[Threshold]:
    """The result of each search.

    `sample(inputs)` returns the bits of some magnitudes of each input. `count(searches)` adds the magnitudes of the
    whole tensor to each search. Raises ArithmeticError where a threshold is NaN.
    """
    open_searches = [(number, search) for number, search in searches if search.k or search.nonzero_fraction is not None]
    if open_searches:
        numbers = sorted({number for number, _ in open_searches})
        samples = dict(zip(numbers, sample(numbers), strict=True))
        for bits in samples.values():
            bits.sort()
        for number, search in open_searches:
            search.bracket(samples[number])
    while pending := [(number, search) for number, search in open_searches if not search.result]:
        for _, search in pending:
            search.start_scan()
        count(pending)
        for _, search in pending:
            search.finish_scan()
    return [search.result or infinite_threshold() for _, search in searches]


def trim(threshold: Threshold, values: Tensor, is_first: bool) -> Tensor:
    """Zero what does not reach the threshold of the whole tensor, in this block, in place.

    Blocks must come in the tensor's order: kept ties are counted off as they pass. `is_first`: this is the first.
    """
    import torch

    limit = threshold.value
    if threshold.ties_kept >= threshold.ties:
        return _zero_up_to(values, next_below(limit))
    if threshold.ties_kept <= 0:
        return _zero_up_to(values, limit)
    left = threshold.ties_kept - (0 if is_first else threshold.ties_seen)
    if left <= 0:
        return _zero_up_to(values, limit)
    count = _count_equal(values, threshold.bits)
    threshold.ties_seen = threshold.ties_kept - left + count
    if count <= left:
        return _zero_up_to(values, next_below(limit))
    is_tie = values.float().abs() == limit
    is_kept = is_tie & (is_tie.flatten().cumsum(0).view(values.shape) <= left)
    ties = torch.where(is_kept, values, 0)
    return _zero_up_to(values, limit).add_(ties)


def next_below(value: float) -> float:
    """The next float32 towards zero."""
    import numpy as np

    return float(np.nextafter(np.float32(value), np.float32(0)))


def subsample(block: Tensor, numel: int, limit: int) -> Tensor:
    """Every n-th element of a block, flat, so that `numel` elements give at most `limit`.

    n is odd, so that the samples of a matrix come from every column.
    """
    return block.flatten()[:: -(-numel // limit) | 1]


def magnitude_bits(values: Tensor) -> Tensor:
    """The magnitudes' float32 bits, flat, as a new int32 tensor."""
    import torch

    return values.float().abs().contiguous().view(torch.int32).flatten()


def magnitude_array(values: Tensor) -> Bits:
    """The same as a numpy array on the CPU."""
    bits: Bits = magnitude_bits(values).cpu().numpy()
    return bits


def split_magnitudes(magnitudes: Tensor, low: int, high: int) -> tuple[int, Bits]:
    """How many bits are `high` at least, and those in [low, high), minus `low`."""
    import numpy as np

    if magnitudes.device.type != "cpu":
        inside_on_device = magnitudes[(magnitudes >= low) & (magnitudes < high)] - low
        return int((magnitudes >= high).sum()), inside_on_device.cpu().numpy()
    bits = magnitudes.numpy()
    above = bits >= np.int32(high)
    inside: Bits = bits[above ^ (bits >= np.int32(low))]
    inside -= np.int32(low)
    return int(np.count_nonzero(above)), inside


def _count_equal(values: Tensor, bits: int) -> int:
    """How many magnitudes have exactly these bits."""
    import numpy as np

    if values.device.type != "cpu":
        return int((magnitude_bits(values) == bits).sum())
    return int(np.count_nonzero(magnitude_array(values) == np.int32(bits)))


def _zero_up_to(values: Tensor, limit: float) -> Tensor:
    """Zero what is not above `limit` in magnitude, in place, comparing in float32."""
    import torch

    if values.dtype == torch.float32:
        return torch.hardshrink(values, limit, out=values)
    return values.mul_(torch.hardshrink(values.float(), limit).sign_().abs_())
