"""The memory that methods declare: `live` block-sized temporaries at once beside their inputs."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergeforge.core.tensor_info import BLOCK_ELEMENTS
from mergeforge.methods import METHODS, Block
from mergeforge.native import bindings

BLOCK_NBYTES = 4 * BLOCK_ELEMENTS
BLOCKS = 3  # of the whole tensor
SLACK = 0.05  # of a block, 100 KB: scalars, Python's own objects


class Through(TorchDispatchMode):
    """Sees every operation and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Peak(TorchDispatchMode):
    """The most bytes of new tensors and numpy arrays that exist at once."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {one.untyped_storage().data_ptr() for one in known}
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
        """numpy's highest since the last note comes on top of the tensors of now."""
        self.peak = max(self.peak, self.nbytes + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()


class Engine:
    """Inputs as the engine gives them: the same scratch blocks, filled anew for every block."""

    def __init__(self, wholes: list[Tensor], columns: int = 1) -> None:
        self.wholes = wholes
        self.scratch = [torch.empty(BLOCK_ELEMENTS // columns, columns) for _ in wholes]

    def block(self, at: int) -> tuple[list[Tensor], Block]:
        start = at * BLOCK_ELEMENTS
        for scratch, whole in zip(self.scratch, self.wholes, strict=True):
            scratch.copy_(whole[start : start + BLOCK_ELEMENTS].view(scratch.shape))
        return list(self.scratch), Block("w", start, 0)

    def look(self, see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        for at in range(BLOCKS):
            yield see(*self.block(at))


def random(count: int) -> list[Tensor]:
    return [torch.randn(BLOCKS * BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(at)) for at in range(count)]


def ties(count: int) -> list[Tensor]:
    """Few different magnitudes: the threshold cuts through equal ones."""
    return [one.mul_(2).round_() for one in random(count)]


def equal(count: int) -> list[Tensor]:
    return [torch.ones(BLOCKS * BLOCK_ELEMENTS) for _ in range(count)]


def misleading(count: int) -> list[Tensor]:
    """What is sampled is far from the rest: the whole range of numbers is searched."""
    wholes = random(count)
    for one in wholes:
        one.view(-1)[:: BLOCK_ELEMENTS // (1 << 16) | 1] *= 1e-20
    return wholes


def parameters(name: str, count: int) -> dict[str, Any]:
    given = {"weight": 0.3, "density": 0.5, "scale": 2.0, "t": 0.3, "normalize": True, "rescale": True, "lambda": 0.5}
    given |= {"select_topk": 0.5}
    known = METHODS[name].parameters.values()
    values = {one.name: given.get(one.name, one.default) for one in known}
    return {one.name: [values[one.name]] * count if one.per_input else values[one.name] for one in known}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Run everything once: importing is no method's memory."""
    with Through():
        for name in METHODS:
            count = min(2, METHODS[name].inputs[1])
            given = parameters(name, count)
            inputs = [torch.ones(8, 1) for _ in range(count)]
            facts = METHODS[name].learn(lambda see, sample=0: iter([see(inputs, Block("w", 0, 0))]), 8, given)  # noqa: B023
            METHODS[name](inputs, facts, Block("w", 0, 0), given)


@pytest.fixture(autouse=True)
def in_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is declared is what torch needs; kernels in C need less."""
    if "in_c" not in request.fixturenames:
        monkeypatch.setattr(bindings, "available", lambda: False)


@pytest.fixture
def in_c() -> None:
    """With kernels, where they are compiled."""


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize(
    ("name", "columns"), [*((name, 1) for name in sorted(METHODS)), ("della", 64), ("della", BLOCK_ELEMENTS)]
)
def test_kernels_need_no_more_than_torch(name: str, columns: int) -> None:
    measured(name, random, min(3, METHODS[name].inputs[1]), columns)


DRAWN = ("dare_linear", "dare_ties", "della", "della_linear")
CASES = [(name, data) for name in sorted(METHODS) for data in (random, ties, equal, misleading)]


@pytest.mark.parametrize(
    ("name", "data"), [(name, data) for name, data in CASES if METHODS[name].facts or data is random]
)
def test_temporaries_stay_within_what_is_declared(name: str, data: Callable[[int], list[Tensor]]) -> None:
    learning, highest = measured(name, data, min(3, METHODS[name].inputs[1]))
    needed = max(highest, learning)
    if name not in DRAWN:
        tight(name, data, needed)


@pytest.mark.parametrize("name", DRAWN)
def test_temporaries_where_masks_are_drawn_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a tensor that is too large to keep them."""
    monkeypatch.setattr(f"{METHODS[name].combine.__module__}.KEPT", 0)
    monkeypatch.setitem(METHODS._entries, name, replace(METHODS[name], facts_nbytes=0))
    tight(name, random, max(measured(name, random, 3, BLOCK_ELEMENTS if "della" in name else 1)))


def tight(name: str, data: Callable[[int], list[Tensor]], needed: float) -> None:
    assert data is not random or METHODS[name].live - needed < 1, f"{METHODS[name].live} declared, {needed:.2f} needed"


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
    """The most blocks that learning (beside what it declares) and combining hold, which are as declared."""
    method = METHODS[name]
    engine = Engine(data(count), columns)
    given = parameters(name, count) | flags
    known = [*engine.wholes, *engine.scratch]
    with Peak(known) as learning:
        facts = method.learn(engine.look, BLOCKS * BLOCK_ELEMENTS, given)
    allowed = method.live * BLOCK_NBYTES + method.facts_nbytes * count
    assert learning.peak <= allowed + SLACK * BLOCK_NBYTES, f"learning: {learning.peak / BLOCK_NBYTES:.2f} blocks"
    highest = 0.0
    for at in range(BLOCKS):
        inputs, block = engine.block(at)
        with Peak(known) as combining:
            method(inputs, facts, block, given)
        highest = max(highest, combining.peak / BLOCK_NBYTES)
    assert highest <= method.live + SLACK, f"combining: {highest:.2f} blocks"
    return (learning.peak - method.facts_nbytes * count) / BLOCK_NBYTES, highest


def test_it_measures() -> None:
    inputs = [torch.ones(BLOCK_ELEMENTS)]
    with Peak(inputs) as peak:
        doubled = inputs[0] * 2
        inputs[0].add_(doubled)
        del doubled
        array = (inputs[0] + 1).numpy().astype("float64")
        del array
    assert peak.peak / BLOCK_NBYTES == pytest.approx(3, abs=SLACK)
    assert peak.nbytes == 0
