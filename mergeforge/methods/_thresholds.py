"""Trimming a task vector to its largest elements: exact, streamed, and without a sort.

Magnitudes are ranked by the bits of their float32 (which order as the numbers do); ranks.py finds the
k-th largest of a whole tensor in about one look, and one at a sample. 32.8 M elements take mergekit's
argsort 7.5 s and this 0.1 s.

Ties at the threshold: the first ones in the order of the flat tensor are kept, so that exactly k
elements remain. (mergekit takes the order of an unstable sort.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.methods import Block, Look
from mergeforge.methods._kth_largest import NOTHING, SEARCH_NBYTES, Search
from mergeforge.methods._sub_blocks import by_elements
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

    from mergeforge.methods._kth_largest import Bits

__all__ = ["SEARCH_NBYTES", "Threshold", "below", "largest", "largest_share", "sample", "some", "survey"]
__all__ += ["thresholds"]

SAMPLE = 1 << 18  # elements of a tensor that is seen whole
SAMPLE_BLOCKS = 8
SAMPLE_ELEMENTS = 1 << 14  # of each sampled block


@dataclass
class Threshold:
    """The k-th largest magnitude: its float32 bits, how many of its ties are kept (the first ones), how many there are.

    `passed`: ties in the blocks that were trimmed since the tensor's first one.
    """

    bits: int
    ties_kept: int
    ties: int
    passed: int = 0

    @property
    def value(self) -> float:
        """The magnitude itself."""
        return _float(self.bits)

    def trim(self, delta: Tensor, begins: bool) -> Tensor:
        """Set all but the largest elements of the whole tensor to zero, in the block that is given.

        Blocks must come in the tensor's order: kept ties are counted off as they pass. `begins`: this is the first.
        """
        import torch

        value = self.value
        if self.ties_kept >= self.ties:
            return _shrink(delta, below(value))
        if self.ties_kept <= 0:
            return _shrink(delta, value)
        left = self.ties_kept - (0 if begins else self.passed)
        if left <= 0:
            return _shrink(delta, value)
        count = _count_equal(delta, self.bits)
        self.passed = self.ties_kept - left + count
        if count <= left:
            return _shrink(delta, below(value))
        is_tie = delta.float().abs() == value
        first = is_tie & (is_tie.flatten().cumsum(0).view(delta.shape) <= left)
        ties = torch.where(first, delta, 0)
        return _shrink(delta, value).add_(ties)


def thresholds(look: Look, numel: int, density: list[float]) -> list[Threshold | None]:
    """For each input the threshold that keeps max(1, int(density * numel)) elements; None keeps all.

    NaN counts as larger than infinity. Raises ArithmeticError where the threshold itself is NaN.
    """
    keep = {at: max(1, int(one * numel)) for at, one in enumerate(density) if one < 1 and numel}
    found = largest(look, numel, keep)
    return [found.get(at) for at in range(len(density))]


def largest(
    look: Look, numel: int, keep: Mapping[int, int], samples: dict[int, Bits] | None = None
) -> dict[int, Threshold]:
    """Input -> the threshold that keeps its `keep` largest elements (for 0: infinity).

    `samples`: bits of some magnitudes of each input, where a look before has seen to them; sorted and taken out.
    Inputs may share one. Raises ArithmeticError where the threshold itself is NaN.
    """
    searches = {at: Search(count, numel) for at, count in keep.items() if count}
    return dict.fromkeys(keep, Threshold(*NOTHING)) | _found(look, searches, samples)


def largest_share(look: Look, numel: int, share: float) -> Threshold:
    """The threshold that keeps int(share * n) of the n elements of the only input that are not zero."""
    return _found(look, {0: Search(0, numel, share)})[0]


def _found(look: Look, searches: dict[int, Search], samples: dict[int, Bits] | None = None) -> dict[int, Threshold]:
    if samples is None:
        samples = _sampled(look, list(searches)) if searches else {}
    for bits in {id(bits): bits for bits in samples.values()}.values():
        bits.sort()
    for at, search in searches.items():
        search.bracket(samples.pop(at))
    while pending := {at: search for at, search in searches.items() if not search.found}:
        _count_all(look, pending)
    return {at: Threshold(*search.found) for at, search in searches.items() if search.found}


def below(value: float) -> float:
    """The next float32 towards zero."""
    import numpy as np

    return float(np.nextafter(np.float32(value), np.float32(0)))


def _sampled(look: Look, inputs: list[int]) -> dict[int, Bits]:
    import numpy as np

    if samples := getattr(look, "samples", None):
        return dict(zip(inputs, samples(inputs), strict=True))

    def see(deltas: list[Tensor], block: Block) -> list[Bits]:
        return [sample(deltas[at], deltas[at].numel(), SAMPLE_ELEMENTS) for at in inputs]

    found = zip(*look(see, sample=SAMPLE_BLOCKS), strict=True)
    return {at: np.concatenate(parts) for at, parts in zip(inputs, found, strict=True)}


def sample(delta: Tensor, numel: int, most: int) -> Bits:
    """The bits of some magnitudes of a block, so many that `numel` elements give at most `most`."""
    return _bits(some(delta, numel, most))


def some(block: Tensor, numel: int, most: int) -> Tensor:
    """Some elements of a block, flat, as `sample` takes them. An odd step sees every column of a matrix."""
    return block.flatten()[:: -(-numel // most) | 1]


def survey(blocks: Iterable[Tensor], numel: int, count: Callable[[Tensor], int]) -> tuple[int, Tensor]:
    """What `count` (which may overwrite a block) adds up to, and a sample of the whole tensor as one flat tensor.

    A sample of a few blocks misleads where rows differ.
    """
    import torch

    total = used = 0
    kept = torch.empty(0)
    for block in blocks:
        seen = some(block, numel, SAMPLE)
        kept = kept if used else seen.new_empty(min(numel, 2 * SAMPLE))
        kept[used : used + len(seen)] = seen
        total, used = total + count(block), used + len(seen)
    return total, kept[:used]


def _count_all(look: Look, searches: dict[int, Search]) -> None:
    """One look over the whole tensor, for all searches."""
    for search in searches.values():
        search.start()
    if split := getattr(look, "split", None):
        for found in split({at: (search.low, search.high) for at, search in searches.items()}):
            for at, (beyond, inside) in found.items():
                searches[at].add(beyond, inside)
    else:
        for _ in look(lambda deltas, block: _count_block(deltas, searches)):
            pass
    for search in searches.values():
        search.finish()


def _count_block(deltas: list[Tensor], searches: dict[int, Search]) -> None:
    """For each search count a block's magnitudes; several may look at the same tensor.

    By a kernel in C or by numpy on a CPU (3-5 times faster than torch); else on the device.
    """
    for delta in {id(deltas[at]): deltas[at] for at in searches}.values():
        looking = [search for at, search in searches.items() if deltas[at] is delta]
        for (part,) in by_elements([delta]) if delta.device.type == "cpu" else [[delta]]:
            bits = None if bindings.is_supported(part) else _magnitude_bits(part)
            for search in looking:
                nonzero = int(part.count_nonzero()) if search.share is not None else 0
                low, high = search.low, search.high
                search.add(*(_split_in_c(part, low, high) if bits is None else _split(bits, low, high)), nonzero)


def _magnitude_bits(delta: Tensor) -> Tensor:
    """The magnitudes' float32 bits, flat, as a new int32 tensor."""
    import torch

    return delta.float().abs().contiguous().view(torch.int32).flatten()


def _bits(delta: Tensor) -> Bits:
    """The same as a numpy array on the CPU."""
    bits: Bits = _magnitude_bits(delta).cpu().numpy()
    return bits


def _split_in_c(part: Tensor, low: int, high: int) -> tuple[int, Bits]:
    """_split of the magnitudes of flat float32 numbers."""
    import numpy as np

    inside, beyond = np.empty(len(part), np.int32), ctypes.c_int64()
    count = bindings.kernels().split(part, len(part), low, high, inside, beyond)
    return beyond.value, inside[:count]


def _split(magnitudes: Tensor, low: int, high: int) -> tuple[int, Bits]:
    """How many bits are `high` at least, and those in [low, high), less `low`."""
    import numpy as np

    if magnitudes.device.type != "cpu":
        inside = magnitudes[(magnitudes >= low) & (magnitudes < high)] - low
        return int((magnitudes >= high).sum()), inside.cpu().numpy()
    bits = magnitudes.numpy()
    beyond = bits >= np.int32(high)
    found: Bits = bits[beyond ^ (bits >= np.int32(low))]
    found -= np.int32(low)
    return int(np.count_nonzero(beyond)), found


def _count_equal(delta: Tensor, value: int) -> int:
    """How many magnitudes have exactly these bits."""
    import numpy as np

    if delta.device.type != "cpu":
        return int((_magnitude_bits(delta) == value).sum())
    return int(np.count_nonzero(_bits(delta) == np.int32(value)))


def _shrink(delta: Tensor, limit: float) -> Tensor:
    """Zero what is not above `limit` in magnitude, in place, comparing in float32."""
    import torch

    if delta.dtype == torch.float32:
        return torch.hardshrink(delta, limit, out=delta)
    return delta.mul_(torch.hardshrink(delta.float(), limit).sign_().abs_())


def _float(bits: int) -> float:
    import struct

    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value
