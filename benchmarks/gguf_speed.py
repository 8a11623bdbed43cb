#!/usr/bin/env python3
"""A checkpoint to GGUF, and a merge straight to GGUF, against llama.cpp's two steps and the raw copy.

    python benchmarks/gguf_speed.py --dir DIR [--llama-cpp TREE --libllama FILE] [--types q4_k_m,q6_k,q8_0] [--rounds 1]

The model has the shape of Llama 3.2 1B (1.24 G parameters). TREE is a llama.cpp source tree, whose
converter writes a bf16 file first; FILE is a libllama.so, whose llama_model_quantize then quantizes it
with as many threads as there are cores. Whole processes, the checkpoint not in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from measure import PYTHON, Measured, in_turn, machine, measure, median, mergeforge, model, table

TESTS = Path(__file__).parents[1] / "tests"
PLAIN = "import sys; sys.modules['mergeforge.native._kernels'] = None; "  # as if the C library were not compiled
PLAIN += "from mergeforge.__main__ import main; sys.exit(main())"
IMPORTS = "import sys, os; from pathlib import Path; from support import llama_cpp_tools as llama_cpp\n"
IMPORTS += "a = sys.argv[1:]\n"
CONVERT = IMPORTS + "assert not llama_cpp.convert([(Path(a[0]), Path(a[1]), 'bf16', 'gpt-2')])"
QUANTIZE = IMPORTS + "llama_cpp.quantize(Path(a[0]), Path(a[1]), int(a[2]), threads=len(os.sched_getaffinity(0)))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--llama-cpp", default="")
    parser.add_argument("--libllama", default="")
    parser.add_argument("--types", default="q4_k_m,q6_k,q8_0")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--parts", default="types,copies,merge")
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"MERGEFORGE_LLAMA_CPP": given.llama_cpp, "MERGEFORGE_LIBLLAMA": given.libllama}
    os.environ["PYTHONPATH"] = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    print(f"{machine()}; --memory {given.memory}\n")
    parts: dict[str, Callable[[argparse.Namespace], str]] = {"types": types, "copies": copies, "merge": merges}
    for name in given.parts.split(","):
        print(parts[name](given), end="\n\n")


def types(given: argparse.Namespace) -> str:
    """Each type: llama.cpp's conversion and quantization, ours with the C library and in plain torch."""
    rows = []
    for kind in given.types.split(","):
        cases = {"native": lambda kind=kind: ours(given, kind)}
        cases |= {"torch": lambda kind=kind: ours(given, kind, plain=True)}
        if given.llama_cpp:
            cases |= {"convert": lambda: convert(given), "quantize": lambda kind=kind: quantize(given, kind)}
        found = in_turn(given.rounds, cases)
        middle = {name: median(runs, lambda run: run.seconds) for name, runs in found.items()}
        theirs = middle.get("convert", 0) + middle.get("quantize", 0)
        ratios = [f"{middle[name] / theirs:.2f}" if theirs else "" for name in ("native", "torch")]
        peak = median(found["native"], lambda run: run.peak) / 2**20
        names = ("convert", "quantize", "native", "torch")
        seconds = [f"{middle[name]:.1f}" if name in middle else "" for name in names]
        rows.append([kind, *seconds, *ratios, f"{peak:.0f}"])
    head = ["type", "convert s", "quantize s", "native s", "torch s", "native / both", "torch / both", "peak MiB"]
    return table(head, rows)


def copies(given: argparse.Namespace) -> str:
    """16-bit GGUF files against the raw copy of the checkpoint."""
    source, out = model(given.dir, "llama-1b"), given.dir / "out"
    raw = Path(__file__).with_name("raw_copy.py")

    def copy() -> Measured:
        _cold(given)
        return measure([PYTHON, str(raw), str(source), str(out)])

    cases = {"raw": copy, "bf16": lambda: ours(given, "bf16"), "f16": lambda: ours(given, "f16")}
    found = in_turn(max(given.rounds, 3), cases)
    importing = median([measure([PYTHON, "-c", "import torch"]) for _ in range(3)], lambda run: run.seconds)
    middle = {name: median(runs, lambda run: run.seconds) for name, runs in found.items()}
    rows = [
        [name, f"{middle[name]:.1f}", f"{(middle[name] - importing) / middle['raw']:.2f}"] for name in ("bf16", "f16")
    ]
    rows.insert(0, ["raw copy", f"{middle['raw']:.1f}", "1"])
    return table(["file", "s", f"less {importing:.1f} s of importing torch / raw"], rows)


def merges(given: argparse.Namespace) -> str:
    """Two 1.1B models averaged: straight to two GGUF types, and to each alone."""
    models = [{"model": str(model(given.dir, "1.1b", seed=seed, near=0))} for seed in (1, 2)]
    base = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}, "dtype": "bfloat16"}
    wanted = {"q4_k_m": ["q4_k_m"], "q8_0": ["q8_0"], "both": ["q4_k_m", "q8_0"]}

    def run(kinds: list[str]) -> Measured:
        _cold(given)
        recipe: dict[str, object] = base | {"output": {"safetensors": False, "gguf": kinds}}
        return mergeforge(recipe, given.dir / "out", "--memory", given.memory)

    cases = {name: lambda kinds=kinds: run(kinds) for name, kinds in wanted.items()}
    found = in_turn(given.rounds, cases)
    middle = {name: median(runs, lambda run: run.seconds) for name, runs in found.items()}
    longer = max(middle["q4_k_m"], middle["q8_0"])
    rows = [[name, f"{seconds:.1f}", f"{seconds / longer:.2f}"] for name, seconds in middle.items()]
    return table(["merge of two 1.1B to", "s", "/ the longer alone"], rows)


def ours(given: argparse.Namespace, kind: str, *, plain: bool = False) -> Measured:
    _cold(given)
    program = ["-c", PLAIN] if plain else ["-m", "mergeforge"]
    options = ["--type", kind, "--out", str(given.dir / "out"), "--memory", given.memory, "--device", "cpu"]
    return measure([PYTHON, *program, "gguf", str(model(given.dir, "llama-1b")), *options, "--pre", "gpt-2"])


def convert(given: argparse.Namespace) -> Measured:
    _cold(given)
    return measure([PYTHON, "-c", CONVERT, str(model(given.dir, "llama-1b")), str(given.dir / "theirs-bf16.gguf")])


def quantize(given: argparse.Namespace, kind: str) -> Measured:
    from mergeforge.gguf.file_types import FILE_TYPES

    target = given.dir / "theirs.gguf"
    source = given.dir / "theirs-bf16.gguf"
    measured = measure([PYTHON, "-c", QUANTIZE, str(source), str(target), str(FILE_TYPES[kind].number)])
    target.unlink()
    return measured


def _cold(given: argparse.Namespace) -> None:
    """Remove the last result, and drop the inputs from the page cache."""
    shutil.rmtree(given.dir / "out", ignore_errors=True)
    for path in given.dir.glob("*/*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
