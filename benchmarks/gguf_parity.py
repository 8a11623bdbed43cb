#!/usr/bin/env python3
"""How our GGUF files compare with llama.cpp's, family by family.

    MERGEFORGE_LLAMA_CPP=TREE MERGEFORGE_LIBLLAMA=FILE python benchmarks/gguf_parity.py [--only llama,qwen2]

For every tiny model of the tests: are key/values, tensors and their order those of the converter (f32,
f16, bf16, q8_0)? How many of llama-quantize's mixes come out equal to its file, byte for byte? How far are the
engine's next-token log-probabilities (F32 file) from those of transformers in float32? tests/gguf/test_whole_files.py
says why some differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import table

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / name) for name in ("", "gguf")]

import test_whole_files as whole
from support import llama_cpp_tools as llama_cpp
from support.gguf_models import TINY, Tiny, folders

from mergeforge.errors import MergeforgeError
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.gguf.llama_cpp import compare_with_transformers

CONVERTED = ("f32", "f16", "bf16", "q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    chosen = [tiny for tiny in TINY if not given.only or tiny.name in given.only.split(",")]
    with tempfile.TemporaryDirectory() as root:
        made = folders(chosen, Path(root) / "models")
        theirs = converted(chosen, made, Path(root))
        rows = [row(tiny, made[tiny.name][0], theirs, Path(root)) for tiny in chosen]
    quantized = sum(int(one[5].split()[0]) for one in rows if one[5])
    print(table(["model", *CONVERTED, f"{len(whole.LLAMA_QUANTIZE_TYPES)} mixes", "engine: max |d log p|"], rows))
    print(f"\n{quantized} quantized files are equal to llama-quantize's.")


def converted(chosen: list[Tiny], made: dict[str, tuple[Path, Path]], root: Path) -> dict[tuple[str, str], Path]:
    """The converter's files: (model, type) -> file."""
    jobs = {}
    for tiny in chosen:
        if tiny.official:
            for kind in CONVERTED:
                jobs[tiny.name, kind] = (made[tiny.name][1], root / f"{tiny.name}.{kind}.gguf", kind, "gpt-2")
    failed = llama_cpp.convert(list(jobs.values()))
    return {key: job[1] for key, job in jobs.items() if str(job[1]) not in failed}


def row(tiny: Tiny, folder: Path, theirs: dict[tuple[str, str], Path], root: Path) -> list[str]:
    try:
        ours = whole.written(folder, root / "ours" / tiny.name, *CONVERTED, *whole.LLAMA_QUANTIZE_TYPES)
    except MergeforgeError:
        return [tiny.name, "refused", "", "", "", "", ""]
    cells = [against_converter(tiny, kind, ours[kind], theirs.get((tiny.name, kind))) for kind in CONVERTED]
    return [tiny.name, *cells, against_quantizer(ours, root), in_engine(tiny, folder, ours["f32"])]


def against_converter(tiny: Tiny, kind: str, ours: Path, theirs: Path | None) -> str:
    if theirs is None:
        return "it fails"
    found = list(whole.differences(tiny, llama_cpp.read(ours), llama_cpp.read(theirs)))
    return f"{len(found)} differ" if found else "equal"


def against_quantizer(ours: dict[str, Path], root: Path) -> str:
    if not llama_cpp.LIBLLAMA:
        return ""
    target, equal = root / "quantized.gguf", 0
    for kind in whole.LLAMA_QUANTIZE_TYPES:
        try:
            llama_cpp.quantize(ours["f32"], target, FILE_TYPES[kind].number)
        except AssertionError:
            continue
        equal += target.read_bytes() == ours[kind].read_bytes()
    return f"{equal} equal"


def in_engine(tiny: Tiny, folder: Path, file: Path) -> str:
    if tiny.name in whole.NOT_RUN:
        return whole.NOT_RUN[tiny.name]
    if tiny not in whole.RUN:
        return "no text model in transformers"
    try:
        return f"{compare_with_transformers(folder, {str(file): 'F32'})[0].max_difference:.4f}"
    except MergeforgeError as error:
        return str(error)[-60:]


if __name__ == "__main__":
    main()
