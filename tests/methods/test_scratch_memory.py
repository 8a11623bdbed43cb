"""The memory that methods declare: `scratch_blocks` block-sized temporaries at once besides their inputs."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from support.method_blocks import of_scan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergeforge.core.tensor_info import BLOCK_ELEMENTS
from mergeforge.methods import METHODS, Block

BLOCK_NBYTES = 4 * BLOCK_ELEMENTS
BLOCKS = 2  # of the whole tensor
SLACK = 0.05  # of a block, 100 KB: scalars, Python's own objects


class Through(TorchDispatchMode):
    """Intercepts every operation and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Peak(TorchDispatchMode):
    """The most bytes of new tensors and numpy arrays that exist at once."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.held: dict[int, tuple[Any, int]] = {}
        self.nbytes = 0
        self.peak = 0

    def __enter__(self) -> Peak:
        gc.collect()
        tracemalloc.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._note()
        super().__exit__(*error)
        tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        self._note()
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.known or key in self.held or not storage.nbytes():
            return
        self.held[key] = (weakref.ref(storage, lambda _: self._free(key)), storage.nbytes())
        self.nbytes += storage.nbytes()

    def _free(self, key: int) -> None:
        self._note()
        self.nbytes -= self.held.pop(key)[1]

    def _note(self) -> None:
        """Add numpy's peak since the last call to the tensors that exist now."""
        self.peak = max(self.peak, self.nbytes + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()


class Engine:
    """Inputs as workers pass them: the same scratch blocks, refilled for every block."""

    def __init__(self, wholes: list[Tensor], columns: int = 1) -> None:
        self.wholes = wholes
        self.scratch = [torch.empty(BLOCK_ELEMENTS // columns, columns) for _ in wholes]

    def block(self, at: int) -> tuple[list[Tensor], Block]:
        start = at * BLOCK_ELEMENTS
        for scratch, whole in zip(self.scratch, self.wholes, strict=True):
            scratch.copy_(whole[start : start + BLOCK_ELEMENTS].view(scratch.shape))
        return list(self.scratch), Block("w", start, 0)

    def scan(self, visit: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        for at in range(BLOCKS):
            yield visit(*self.block(at))


@cache
def random(count: int) -> list[Tensor]:
    """Normally distributed inputs; nothing writes to them."""
    return [torch.randn(BLOCKS * BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(at)) for at in range(count)]


def ties(count: int) -> list[Tensor]:
    """Few different magnitudes: the threshold cuts through equal ones."""
    return [tensor.mul(2).round_() for tensor in random(count)]


def equal(count: int) -> list[Tensor]:
    return [torch.ones(BLOCKS * BLOCK_ELEMENTS) for _ in range(count)]


def misleading(count: int) -> list[Tensor]:
    """The sample is unlike the rest: the whole range of numbers is searched."""
    wholes = [tensor.clone() for tensor in random(count)]
    for whole in wholes:
        whole.view(-1)[:: BLOCK_ELEMENTS // (1 << 16) | 1] *= 1e-20
    return wholes


def parameters(name: str, count: int) -> dict[str, Any]:
    given = {"weight": 0.3, "density": 0.5, "scale": 2.0, "t": 0.3, "normalize": True, "rescale": True, "lambda": 0.5}
    given |= {"select_topk": 0.5}
    known = METHODS[name].parameters.values()
    values = {one.name: given.get(one.name, one.default) for one in known}
    return {one.name: [values[one.name]] * count if one.per_input else values[one.name] for one in known}


def visit_one_block(
    inputs: list[Tensor], visit: Callable[[list[Tensor], Block], Any], sample: int = 0
) -> Iterator[Any]:
    yield visit(inputs, Block("w", 0, 0))


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """Run every method once, so that imports do not count as a method's memory; make garbage collection quick."""
    with Through():
        for name in METHODS:
            count = min(2, METHODS[name].inputs[1])
            given = parameters(name, count)
            inputs = [torch.ones(8, 1) for _ in range(count)]
            prepared = METHODS[name].prepare(of_scan(partial(visit_one_block, inputs), 8, count), given)
            METHODS[name].merge_block(inputs, prepared, Block("w", 0, 0), given)
    gc.collect()
    gc.freeze()  # what torch has created stays anyway: collecting it takes a third of a second each time
    yield
    gc.unfreeze()


CASES = [(name, data) for name in sorted(METHODS) for data in (random, ties, equal, misleading)]


@pytest.mark.parametrize(
    ("name", "data"), [(name, data) for name, data in CASES if METHODS[name].needs_stats or data is random]
)
def test_temporaries_stay_within_the_declared_scratch_blocks(name: str, data: Callable[[int], list[Tensor]]) -> None:
    stats_blocks, highest = measured(name, data, min(3, METHODS[name].inputs[1]))
    tight(name, data, max(highest, stats_blocks))


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_temporaries_of_long_rows(name: str) -> None:
    tight(name, random, max(measured(name, random, 3, BLOCK_ELEMENTS)))


def tight(name: str, data: Callable[[int], list[Tensor]], needed: float) -> None:
    assert data is not random or METHODS[name].scratch_blocks - needed < 1, (
        f"{METHODS[name].scratch_blocks} declared, {needed:.2f} needed"
    )


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if METHODS[name].inputs[1] > 6])
def test_temporaries_do_not_grow_with_the_inputs(name: str) -> None:
    measured(name, random, 6)


@pytest.mark.parametrize("columns", [1, 64, 1 << 18, BLOCK_ELEMENTS])
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
        ("della", {}),
        ("arcee_fusion", {}),
    ],
)
def test_temporaries_of_rows_and_columns(name: str, flags: dict[str, Any], columns: int) -> None:
    if not ("nuslerp_row_wise" in flags and columns == BLOCK_ELEMENTS):  # more columns than it provides for
        measured(name, random, 2, columns, **flags)


def measured(
    name: str, data: Callable[[int], list[Tensor]], count: int, columns: int = 1, **flags: bool
) -> tuple[float, float]:
    """The most blocks that the statistics (beyond the declared stats_nbytes) and combining hold; checks both limits."""
    method = METHODS[name]
    engine = Engine(data(count), columns)
    given = parameters(name, count) | flags
    known = [*engine.wholes, *engine.scratch]
    with Peak(known) as stats_peak:
        prepared = method.prepare(of_scan(engine.scan, BLOCKS * BLOCK_ELEMENTS, count), given)
    allowed = method.scratch_blocks * BLOCK_NBYTES + method.stats_nbytes * count
    assert stats_peak.peak <= allowed + SLACK * BLOCK_NBYTES, f"stats: {stats_peak.peak / BLOCK_NBYTES:.2f} blocks"
    highest = 0.0
    for at in range(BLOCKS):
        inputs, block = engine.block(at)
        with Peak(known) as combine_peak:
            method.merge_block(inputs, prepared, block, given)
        highest = max(highest, combine_peak.peak / BLOCK_NBYTES)
    assert highest <= method.scratch_blocks + SLACK, f"combining: {highest:.2f} blocks"
    return (stats_peak.peak - method.stats_nbytes * count) / BLOCK_NBYTES, highest


def test_peak_counts_tensors_and_arrays() -> None:
    inputs = [torch.ones(BLOCK_ELEMENTS)]
    with Peak(inputs) as peak:
        doubled = inputs[0] * 2
        inputs[0].add_(doubled)
        del doubled
        array = (inputs[0] + 1).numpy().astype("float64")
        del array
    assert peak.peak / BLOCK_NBYTES == pytest.approx(3, abs=SLACK)
    assert peak.nbytes == 0
