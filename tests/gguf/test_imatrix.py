"""mergeforge.gguf.imatrix: imatrix files of both formats, and errors for broken ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from mergeforge.errors import SourceError
from mergeforge.gguf.imatrix import read_imatrix

SUMS = np.array([[2, 4, 6, 8], [9, 9, 9, 9], [1, 0, 3, 5]], np.float32)
COUNTS = np.array([[2], [0], [4]], np.float32)


def write_gguf(path: Path, tensors: dict[str, np.ndarray], keys: bool = True) -> Path:
    """An imatrix as llama-imatrix writes it."""
    writer = GGUFWriter(path, "")
    if keys:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["wiki.txt"])
        writer.add_uint32("imatrix.chunk_count", 7)
        writer.add_uint32("imatrix.chunk_size", 512)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat(entries: dict[str, tuple[int, list[float]]], trailer: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += (
            struct.pack("<i", len(name))
            + name.encode()
            + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
        )
    return data + trailer


def test_gguf_sums_over_counts(tmp_path: Path) -> None:
    """For each expert; an expert that was never used gives all columns weight 1."""
    path = write_gguf(tmp_path / "i.gguf", {"a.weight.in_sum2": SUMS, "a.weight.counts": COUNTS})
    imatrix = read_imatrix(path)
    assert imatrix.weights["a.weight"].tolist() == [[1, 2, 3, 4], [1, 1, 1, 1], [0.25, 0, 0.75, 1.25]]
    assert imatrix.weights["a.weight"].dtype == np.float32
    assert (imatrix.datasets, imatrix.chunks) == (("wiki.txt",), 7)


def test_dat_sums_over_calls(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat({"a.weight": (2, [2, 4]), "b.weight": (0, [3, 5])}, struct.pack("<ii", 9, 4) + b"wiki"))
    imatrix = read_imatrix(path)
    assert {name: weights.tolist() for name, weights in imatrix.weights.items()} == {
        "a.weight": [[1, 2]],
        "b.weight": [[3, 5]],
    }
    assert (imatrix.datasets, imatrix.chunks) == (("wiki",), 9)
    path.write_bytes(dat({"a.weight": (2, [2, 4])}))
    assert (read_imatrix(path).datasets, read_imatrix(path).chunks) == ((), 0)


def test_column_weights_of_a_tensor(tmp_path: Path) -> None:
    """None for a tensor without weights and for an embedding of another size; another size is an error elsewhere."""
    names = ("a.weight", "token_embd.weight")
    tensors = {name + part: data for name in names for part, data in ((".in_sum2", SUMS), (".counts", COUNTS))}
    imatrix = read_imatrix(write_gguf(tmp_path / "i.gguf", tensors))
    weights = imatrix.column_weights("a.weight", 4, 3)
    assert weights is not None and weights.shape == (3, 4)
    assert imatrix.column_weights("b.weight", 4) is None
    assert imatrix.column_weights("token_embd.weight", 8) is None
    with pytest.raises(SourceError, match=r"i.gguf: a.weight has 3 x 4 values, but the tensor needs 1 x 8"):
        imatrix.column_weights("a.weight", 8)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "ends within an entry"),
    "text": (lambda path: path.write_bytes(b"hello, this is no imatrix"), "neither a GGUF nor a .dat imatrix"),
    "cut gguf": (
        lambda path: path.write_bytes(write_gguf(path, {"a.in_sum2": SUMS}).read_bytes()[:150]),
        "not a complete GGUF file",
    ),
    "gguf of a model": (
        lambda path: write_gguf(path, {"a.weight": SUMS}, keys=False),
        "not an imatrix: it lacks",
    ),
    "no entries": (lambda path: write_gguf(path, {"a.weight": SUMS}), "has no entries"),
    "no counts": (lambda path: write_gguf(path, {"a.in_sum2": SUMS}), "a needs both sums and counts"),
    "half sums": (
        lambda path: write_gguf(path, {"a.in_sum2": SUMS.astype(np.float16), "a.counts": COUNTS}),
        "must be F32",
    ),
    "counts do not fit": (
        lambda path: write_gguf(path, {"a.in_sum2": SUMS, "a.counts": np.ones(5, np.float32)}),
        "12 sums do not fit 5",
    ),
    "nan": (lambda path: write_gguf(path, {"a.in_sum2": SUMS * np.nan, "a.counts": COUNTS}), "not finite"),
    "negative": (lambda path: write_gguf(path, {"a.in_sum2": -SUMS, "a.counts": COUNTS}), "negative weight"),
    "dat cut": (lambda path: path.write_bytes(dat({"a": (1, [1, 2, 3])})[:-2]), "ends within an entry"),
    "dat without values": (lambda path: path.write_bytes(dat({"a": (1, [])})), "a has 0 values"),
    "dat nan": (lambda path: path.write_bytes(dat({"a": (1, [float("nan")])})), "not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_for_broken_files(name: str, tmp_path: Path) -> None:
    """Each error names the file and the problem, and has a hint."""
    make, message = BROKEN[name]
    path = tmp_path / "imatrix"
    make(path)
    with pytest.raises(SourceError, match=message) as error:
        read_imatrix(path)
    assert str(path) in str(error.value) and error.value.hint
