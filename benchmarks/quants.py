"""Speed of encoding GGUF types on one core: the C library, torch, and llama.cpp's code for comparison.

    python benchmarks/quants.py [--rows 512] [--columns 4096] [--rounds 5] [TYPE ...]

Millions of elements per second of processor time, the best of several rounds; "*": with an importance vector.
The ggml column needs the xllamacpp wheel. The first call of every encoder is not measured.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import machine, table

from mergeforge.gguf.quantize import QUANT_TYPES, QuantType, backend_for, encode


def reference() -> Callable[..., None] | None:
    """ggml_quantize_chunk() of the xllamacpp wheel; None if it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    sizes = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]

    def ggml_encode(quant_type: QuantType, rows: torch.Tensor, importance: torch.Tensor | None) -> None:
        weights = importance.data_ptr() if importance is not None else None
        out = torch.empty(len(rows), quant_type.row_nbytes(rows.shape[1]), dtype=torch.uint8)
        library.ggml_quantize_chunk(quant_type.number, rows.data_ptr(), out.data_ptr(), 0, *rows.shape, weights)

    return ggml_encode


def speed(rounds: int, numel: int, encoder: Callable[..., Any], *arguments: Any) -> str:
    """Millions of elements per second of this thread's processor time."""
    encoder(*arguments)
    best = float("inf")
    for _ in range(rounds):
        started = time.thread_time()
        encoder(*arguments)
        best = min(best, time.thread_time() - started)
    return f"{numel / best / 1e6:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "types", nargs="*", default=[name for name, quant_type in QUANT_TYPES.items() if quant_type.block > 1]
    )
    for name, default in (("rows", 512), ("columns", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0))
    encoders: dict[str, Callable[..., Any] | None] = {"torch": partial(encode, backend="torch"), "ggml": reference()}
    if backend_for("cpu") == "native":
        encoders = {"native": partial(encode, backend="native"), **encoders}
    lines = []
    for quant_type in (QUANT_TYPES[name.upper()] for name in options.types):
        for importance in (None, torch.rand(options.columns)):
            if importance is None and quant_type.needs_importance:
                continue
            speeds = [
                speed(options.rounds, rows.numel(), encoder, quant_type, rows, importance)
                if encoder and (name != "torch" or quant_type.quantize_torch)
                else "-"
                for name, encoder in encoders.items()
            ]
            lines.append([quant_type.name + ("" if importance is None else " *"), *speeds])
    print(
        machine(), f"{options.rows} x {options.columns} normal values, M elements/s of one core", sep="\n", end="\n\n"
    )
    print(table(["type", *encoders], lines))


if __name__ == "__main__":
    main()
