"""Wrong arguments at the border of the C library are refused before anything is read or written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergeforge.native import bindings

pytestmark = pytest.mark.needs_kernels

LENGTH = 3000
NOTHING = np.empty(0, np.uint8)


def floats(count: int = LENGTH) -> np.ndarray:
    return np.arange(count, dtype=np.float32)


def tensor(count: int = LENGTH) -> tuple[Any, int, str]:
    return (floats(count).view(np.uint8), 0, "F32")


def reduction(count: int = 2, **changed: Any) -> tuple[Any, ...]:
    fields: dict[str, Any] = {"combine": 0, "keep": 0, "fused": False, "normalize": False, "divisor": 1.0, "scale": 1.0}
    fields |= {"t": 0.0, "min_divisor": 0.0, "row_length": 100, "factors": floats(count), "weights": floats(count)}
    fields |= {"kept": None, **changed}
    return tuple(fields.values())


def by_rank(ranks: np.ndarray, bits: Any = None, rows: int = 0, **changed: Any) -> tuple[Any, ...]:
    return reduction(keep=3, kept=(ranks, bits, rows, False), **changed)


def reduce(**changed: Any) -> float:
    arguments: dict[str, Any] = {"inputs": [tensor(), tensor(), tensor()], "has_base": True, "reduction": reduction()}
    arguments |= {"element": 0, "length": LENGTH, "dtype": "F32", "out": np.zeros(4 * LENGTH, np.uint8)}
    arguments |= {"changes": np.zeros(5), "measured": 0, "read_buffer": NOTHING, **changed}
    largest: float = bindings.kernels().reduce(*arguments.values())
    return largest


def test_the_arguments_that_the_others_are_made_from_are_right() -> None:
    out = np.zeros(4 * LENGTH, np.uint8)
    assert reduce(out=out) == LENGTH - 1
    assert out.view(np.float32).tolist() == floats().tolist()


SHORT, LONG = np.zeros(4 * LENGTH - 4, np.uint8), np.zeros(4 * LENGTH + 4, np.uint8)
READ_ONLY = np.zeros(4 * LENGTH, np.uint8)
READ_ONLY.flags.writeable = False
UNALIGNED = np.zeros(4 * LENGTH + 1, np.uint8)[1:]
RANKS = np.zeros((2, 9), np.uint32)
RANGES = np.full((2, 6), -1, np.int64)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "out is too short": (ValueError, {"out": SHORT}),
    "out is too long": (ValueError, {"out": LONG}),
    "out holds floats": (TypeError, {"out": floats()}),
    "out is read-only": (ValueError, {"out": READ_ONLY}),
    "out is not contiguous": (ValueError, {"out": np.zeros(8 * LENGTH, np.uint8)[::2]}),
    "out is not aligned": (ValueError, {"out": UNALIGNED}),
    "out is no array": (TypeError, {"out": None}),
    "out is bytes": (ValueError, {"out": bytes(4 * LENGTH)}),
    "an unknown dtype": (ValueError, {"dtype": "F64"}),
    "changes are too short": (ValueError, {"changes": np.zeros(4)}),
    "changes are float32": (TypeError, {"changes": np.zeros(5, np.float32)}),
    "an input is too short": (ValueError, {"inputs": [tensor(), tensor(), tensor(LENGTH - 1)]}),
    "an input starts too late": (ValueError, {"inputs": [tensor(), tensor(), (tensor()[0], 4, "F32")]}),
    "an input starts before its bytes": (ValueError, {"inputs": [tensor(), tensor(), (tensor()[0], -4, "F32")]}),
    "an input starts far behind its bytes": (ValueError, {"inputs": [(tensor()[0], 1 << 62, "F32")] * 3}),
    "an input is not aligned": (ValueError, {"inputs": [(LONG, 1, "F32")] * 3}),
    "an input is not contiguous": (ValueError, {"inputs": [(np.zeros(8 * LENGTH, np.uint8)[::2], 0, "F32")] * 3}),
    "an input holds floats": (TypeError, {"inputs": [(floats(), 0, "F32")] * 3}),
    "an input has an unknown dtype": (ValueError, {"inputs": [(tensor()[0], 0, "I8")] * 3}),
    "an input is no tuple": (TypeError, {"inputs": [None] * 3}),
    "an input lacks its dtype": (TypeError, {"inputs": [(tensor()[0], 0)] * 3}),
    "an input is a negative file": (ValueError, {"inputs": [(-1, 0, "F32")] * 3}),
    "an input is a file without a read buffer": (ValueError, {"inputs": [(0, 0, "F32")] * 3}),
    "a huge file descriptor": ((OverflowError, ValueError), {"inputs": [(1 << 70, 0, "F32")] * 3}),
    "inputs are no list": (TypeError, {"inputs": (tensor(),) * 3}),
    "there is only a base": (ValueError, {"inputs": [tensor()]}),
    "there are no inputs": (ValueError, {"inputs": [], "has_base": False}),
    "the length is negative": (ValueError, {"length": -1}),
    "the length is huge": (ValueError, {"length": 1 << 62}),
    "the first element is negative": (ValueError, {"element": -1}),
    "the first element is huge": (ValueError, {"element": 1 << 62}),
    "the read buffer holds floats": (TypeError, {"read_buffer": floats()}),
    "the reduction is no tuple": (TypeError, {"reduction": None}),
    "the reduction is too short": (TypeError, {"reduction": reduction()[:-1]}),
    "an unknown combination": (ValueError, {"reduction": reduction(combine=4)}),
    "a negative combination": (ValueError, {"reduction": reduction(combine=-1)}),
    "an unknown kind of what is kept": (ValueError, {"reduction": reduction(keep=5)}),
    "too few factors": (ValueError, {"reduction": reduction(factors=floats(1))}),
    "too many factors": (ValueError, {"reduction": reduction(factors=floats(3))}),
    "factors are float64": (TypeError, {"reduction": reduction(factors=np.zeros(2))}),
    "too few weights": (ValueError, {"reduction": reduction(weights=floats(1))}),
    "no rows": (ValueError, {"reduction": reduction(row_length=0)}),
    "huge rows": (ValueError, {"reduction": reduction(row_length=1 << 40)}),
    "nearswap of three": (ValueError, {"reduction": reduction(combine=3)}),
    "a sum by variance": (ValueError, {"reduction": reduction(keep=4, kept=RANGES[:1].copy())}),
    "no masks": (TypeError, {"reduction": reduction(keep=1)}),
    "too few masks": (ValueError, {"reduction": reduction(keep=1, kept=np.zeros((1, 5), np.uint32))}),
    "masks are int64": (TypeError, {"reduction": reduction(keep=1, kept=np.zeros((2, 5), np.int64))}),
    "too few ranges": (ValueError, {"reduction": reduction(keep=2, kept=RANGES[:1].copy())}),
    "ranges are int32": (TypeError, {"reduction": reduction(keep=2, kept=RANGES.astype(np.int32))}),
    "ranges are not contiguous": (ValueError, {"reduction": reduction(keep=2, kept=np.full((2, 12), -1)[:, ::2])}),
    "ranks are no tuple": (TypeError, {"reduction": reduction(keep=3, kept=np.zeros((2, 9), np.uint32))}),
    "too few ranks": (ValueError, {"reduction": by_rank(np.zeros((2, 8), np.uint32))}),
    "ranks' bits are too short": (ValueError, {"reduction": by_rank(RANKS, np.zeros(2 * 30 * 13 - 1, np.uint8), 30)}),
    "ranks' bits have negative rows": (ValueError, {"reduction": by_rank(RANKS, np.zeros(0, np.uint8), -1)}),
    "ranks' bits have too many rows": (ValueError, {"reduction": by_rank(RANKS, np.zeros(0, np.uint8), 1 << 62)}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case: str) -> None:
    error, changed = WRONG[case]
    out = changed.get("out", np.full(4 * LENGTH, 7, np.uint8))
    with pytest.raises(error):
        reduce(**{"out": out, **changed})
    if "out" not in changed:
        assert bool((out == 7).all())


def test_the_read_buffer_must_hold_a_row_of_each_input(tmp_path: Any) -> None:
    """Rows are ranked as a whole."""
    (tmp_path / "file").write_bytes(bytes(4 * LENGTH))
    with (tmp_path / "file").open("rb") as file:
        inputs = [(file.fileno(), 0, "F32")] * 3
        ranked = by_rank(np.full((2, 9), 1, np.uint32), row_length=LENGTH)
        with pytest.raises(ValueError, match="read buffer is too small"):
            reduce(inputs=inputs, reduction=ranked, read_buffer=np.empty(3 * 4 * (LENGTH - 1), np.uint8))
        with pytest.raises(ValueError, match="not aligned"):
            reduce(inputs=inputs, read_buffer=np.empty(3 * 4 * LENGTH + 1, np.uint8)[1:])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("l1_norms", ([tensor()] * 2, False, reduction(keep=4, kept=RANGES[:1].copy(), combine=2), 0, LENGTH)),
        ("l1_norms", ([tensor()] * 2, False, reduction(), 0, LENGTH)),
        ("kept_squares", ([tensor()] * 2, False, reduction(), 0, LENGTH)),
        ("load_values", ([tensor()], False, LENGTH)),
        ("variances", ([tensor()], False, LENGTH)),
        ("inner_products", ([tensor()] * 2, False, LENGTH)),
    ],
)
@pytest.mark.parametrize("out", [np.zeros(1), np.zeros(LENGTH + 1, np.float32), np.zeros(0, np.float32), None])
def test_results_of_the_wrong_size_or_type_are_refused(name: str, arguments: tuple[Any, ...], out: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        getattr(bindings.kernels(), name)(*arguments, out, NOTHING)


@pytest.mark.parametrize(
    ("intervals", "counts"),
    [
        ([(2, 0, 1, 0, np.zeros(4096, np.int32))], np.zeros(4, np.int64)),
        ([(-2, 0, 1, 0, np.zeros(4096, np.int32))], np.zeros(4, np.int64)),
        ([(0, -1, 1, 0, np.zeros(4096, np.int32))], np.zeros(4, np.int64)),
        ([(0, 0, 1, 0, np.zeros(2047, np.int32))], np.zeros(4, np.int64)),
        ([(0, 0, 1, 0, np.zeros(4096, np.int64))], np.zeros(4, np.int64)),
        ([(0, 0, 1, 0, np.zeros(4096, np.int32))], np.array([4000, 0, 0, 0])),
        ([(0, 0, 1, 0, np.zeros(4096, np.int32))], np.array([-1, 0, 0, 0])),
        ([(0, 0, 1, 0, np.zeros(4096, np.int32))], np.zeros(3, np.int64)),
        ([(0, 0, 1, 1, np.zeros(4096, np.int32))], np.zeros(4, np.int64)),
        ([(0, 5, 9, 4, np.zeros(4096, np.int32))], np.zeros(4, np.int64)),
        ([(0, 0, 1, 0)], np.zeros(4, np.int64)),
        ([None], np.zeros(4, np.int64)),
        (None, np.zeros(0, np.int64)),
    ],
)
def test_wrong_intervals_are_refused(intervals: Any, counts: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        bindings.kernels().count_magnitudes([tensor(), tensor()], False, LENGTH, intervals, counts, NOTHING)


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "INTERFACE", bindings.INTERFACE + 1)
    assert bindings._load.__wrapped__() == (None, "is of another version; install mergeforge again")


def test_a_library_older_than_its_source_is_refused(tmp_path: Any) -> None:
    library, source = tmp_path / "_kernels.so", tmp_path / "reductions.c"
    library.touch()
    assert not bindings._is_outdated(library)  # a wheel carries no source
    source.touch()
    import os

    os.utime(library, (1, 1))
    assert bindings._is_outdated(library)
