"""How fast GGUF types are encoded on one core: kernels, torch, and llama.cpp's own code for comparison.

    python benchmarks/quants.py [--rows 512] [--columns 4096] [--rounds 5] [TYPE ...]

Millions of elements a second of processor time, the best of some rounds in turn; "*" with an importance vector.
The C column needs the xllamacpp wheel. The first call of every kernel, which may compile it, is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine, table

from mergeforge.gguf import quantize
from mergeforge.gguf.quantize import QUANT_TYPES, QuantType


def reference() -> Callable[..., None] | None:
    """ggml_quantize_chunk() of the xllamacpp wheel, if it is installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    sizes = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]

    def encode(kind: QuantType, rows: torch.Tensor, importance: torch.Tensor | None, out: torch.Tensor) -> None:
        weights = importance.data_ptr() if importance is not None else None
        library.ggml_quantize_chunk(kind.number, rows.data_ptr(), out.data_ptr(), 0, *rows.shape, weights)

    return encode


def speed(rounds: int, numel: int, encode: Callable[..., Any], *arguments: Any) -> str:
    """M elements per second of this thread's processor time."""
    encode(*arguments)
    best = float("inf")
    for _ in range(rounds):
        started = time.thread_time()
        encode(*arguments)
        best = min(best, time.thread_time() - started)
    return f"{numel / best / 1e6:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=[kind.name for kind in QUANT_TYPES.values() if kind.block > 1])
    for name, default in (("rows", 512), ("columns", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0))
    ways = {"torch": quantize._fill, "C": reference()}
    if quantize.backend("cpu") == "numba":
        ways = {"numba": quantize._fill_compiled, **ways}
    lines = []
    for kind in (QUANT_TYPES[name.upper()] for name in options.types):
        for importance in (None, torch.rand(options.columns)):
            out = torch.empty(options.rows, kind.row_nbytes(options.columns), dtype=torch.uint8)
            job = (kind, rows, importance, out)
            found = [speed(options.rounds, rows.numel(), way, *job) if way else "-" for way in ways.values()]
            lines.append([kind.name + ("" if importance is None else " *"), *found])
    print(
        machine(), f"{options.rows} x {options.columns} normal values, M elements/s of one core", sep="\n", end="\n\n"
    )
    print(table(["type", *ways], lines))


if __name__ == "__main__":
    main()
