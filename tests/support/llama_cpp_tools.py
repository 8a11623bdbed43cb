"""llama.cpp as a reference, if the test machine has it: its converter and its quantizer.

The converter needs a llama.cpp source tree, such as the one inside the xllamacpp source package; the environment
variable MERGEFORGE_LLAMA_CPP names it. The quantizer is in the libllama.so that MERGEFORGE_LIBLLAMA names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TREE = os.environ.get("MERGEFORGE_LLAMA_CPP", "")
needs_converter = pytest.mark.skipif(not TREE, reason="MERGEFORGE_LLAMA_CPP does not name a llama.cpp tree")

_CONVERT = """
import json, os, runpy, sys
tree, *more = sys.argv[1:]
sys.path[:0] = [tree, tree + "/gguf-py"]
import conversion.base as base
import conversion.deepseek as deepseek
# it asks for add_bos_token, which transformers 5 does not keep
deepseek.DeepseekV32Model.set_vocab = base.TextModel._set_vocab_gpt2
known = base.TextModel.get_vocab_base_pre
names = base.gguf.TensorNameMap
table = dict(names.block_mappings_cfg)
failed = {}
for folder, out, outtype, pre in json.load(sys.stdin):
    base.TextModel.get_vocab_base_pre = (lambda self, tokenizer, pre=pre: pre) if pre else known
    names.block_mappings_cfg = dict(table)  # Arctic's names would stay for the models after it
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", outtype, *more]
    try:
        runpy.run_path(tree + "/convert_hf_to_gguf.py", run_name="__main__")
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            import traceback; traceback.print_exc()
            failed[out] = f"{type(error).__name__}: {error}"
print("RESULT" + json.dumps(failed))
"""


def convert(jobs: Sequence[tuple[Path, Path, str, str]], *, mmproj: bool = False) -> dict[str, str]:
    """Run the official converter on (folder, file, outtype, pre or ""). Returns file -> error of those that failed.

    mmproj: write the towers, not the model.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, TREE, *(["--mmproj"] if mmproj else [])],
        input=json.dumps([[str(item) for item in job] for job in jobs]),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-4000:]
    failed: dict[str, str] = json.loads(lines[-1].removeprefix("RESULT"))
    return failed


@dataclass(frozen=True)
class Read:
    """A GGUF file: key -> (type names, value), tensor -> (type name, shape slowest first, bytes)."""

    keys: dict[str, tuple[tuple[str, ...], Any]]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]


def read(path: Path) -> Read:
    """The contents of a small GGUF file, read by the gguf package; both dicts in the order of the file."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {
        name: (tuple(kind.name for kind in field.types), field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(int(size) for size in reversed(tensor.shape)),
            np.asarray(tensor.data).tobytes(),
        )
        for tensor in reader.tensors
    }
    return Read(keys, tensors)


def read_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors as in Read, by our own reader, which knows types that the gguf package does not."""
    from mergeforge.gguf.reader import read_gguf

    data = path.read_bytes()
    return {
        name: (tensor.ggml_type, tensor.shape, data[tensor.offset : tensor.offset + tensor.nbytes])
        for name, tensor in read_gguf(path).tensors.items()
    }


LIBLLAMA = os.environ.get("MERGEFORGE_LIBLLAMA", "")
needs_quantizer = pytest.mark.skipif(not LIBLLAMA, reason="MERGEFORGE_LIBLLAMA does not name a libllama.so")


def quantize(
    source: Path,
    target: Path,
    file_type: int,
    *,
    threads: int = 1,
    imatrix: Mapping[str, np.ndarray] | None = None,
    **flags: bool,
) -> int:
    """Quantize with the function that llama-quantize calls (llama.h, llama_model_quantize); returns its exit code.

    flags: allow_requantize, only_copy, pure, keep_split. imatrix: name -> weights, float32.
    """
    import ctypes

    names = ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")

    class Entry(ctypes.Structure):
        _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    class Settings(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_int32) for name in ("threads", "file_type", "output_type", "embedding_type")),
            *((name, ctypes.c_bool) for name in names),
            *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "tensor_types", "prune_layers")),
            ("rest", ctypes.c_int64 * 16),
        )

    library = ctypes.CDLL(LIBLLAMA)
    library.llama_model_quantize_default_params.restype = Settings
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Settings))
    settings = library.llama_model_quantize_default_params()
    settings.threads, settings.file_type = threads, file_type
    for name, value in flags.items():
        assert name in names
        setattr(settings, name, value)
    if imatrix is not None:
        entries = [Entry(name.encode(), weights.ctypes.data, weights.size) for name, weights in imatrix.items()]
        table = (Entry * (len(entries) + 1))(*entries, Entry())
        settings.imatrix = ctypes.addressof(table)
    code: int = library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    return code
